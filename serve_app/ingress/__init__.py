"""HTTP: each file turns one wire dialect into requests to the router and its answers back."""

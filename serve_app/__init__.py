"""The Ray Serve graph that puts speech engines behind HTTP and Python handles."""

"""Audio on its way out. ``encode`` turns engine samples into the bytes a client asked for."""

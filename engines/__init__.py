"""Speech models behind one contract.

Plain Python: nothing here imports Ray, HTTP or the server's settings. ``contract`` is what an engine
must do, ``registry`` is how a name becomes an engine class, and every other folder is one engine whose
``engine.py`` is its door.
"""

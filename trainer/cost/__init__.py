"""What training costs, computed before anything is loaded: bytes of each part, operations of each part, seconds.

Everything here is a function of shapes, of what trains, and of what a micro-batch holds. `docs/scaling.md` says how far
it was held against measurements.
"""

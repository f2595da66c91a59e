"""Messages over ZeroMQ: typed payloads with zero-copy frames, credits, deadlines, liveness. Serves `vtriune.runtime`.

Nothing here knows what an actor is: the runtime gives messages their meaning.
"""

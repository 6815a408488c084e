"""Media files: video and still encoders, fragments of a stream, provenance, and figures of quality. It knows neither
rows nor storage.
"""

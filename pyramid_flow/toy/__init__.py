"""The bundled model: its weights, the synthetic world it was trained on, and the judge of what it makes."""

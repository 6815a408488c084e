"""Several GPUs for one clip: how processes share the guidance branches and the tokens, and how they are started."""

"""The online service: videos that are asked for over HTTP wait in a table, and the farm's stages make them."""

"""Input images: reading picture files of strangers, and fitting images to a video's size. What the VAE makes of pixels
belongs to `pixels`.
"""

"""The causal video VAE."""

from pyramid_flow.vae.model import CausalVideoVAE, LatentDistribution, VAEState, temporal_chunks

__all__ = ["CausalVideoVAE", "LatentDistribution", "VAEState", "temporal_chunks"]

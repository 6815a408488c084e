"""The networks as models of diffusers, with `from_pretrained`, `save_pretrained` and `config`.

No other module of the package imports diffusers: counting a network's tensors and memory requires the network alone.
"""

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

from pyramid_flow.transformer.flux import FluxNetwork
from pyramid_flow.transformer.mmdit import MMDiTNetwork
from pyramid_flow.transformer.model import PyramidTransformer
from pyramid_flow.vae.model import VAENetwork


class TransformerModel(PyramidTransformer, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A velocity model of either family."""

    _supports_gradient_checkpointing = True
    dtype = ModelMixin.dtype  # accounts for layerwise casting


class PyramidFluxTransformer(FluxNetwork, TransformerModel):  # type: ignore[misc]
    """The published miniFLUX velocity model, see `FluxNetwork`."""

    _repeated_blocks = ("JointBlock", "SingleBlock")  # type: ignore[assignment]
    _no_split_modules = ("JointBlock", "SingleBlock")  # type: ignore[assignment]
    __init__ = register_to_config(FluxNetwork.__init__)


class PyramidDiffusionMMDiT(MMDiTNetwork, TransformerModel):  # type: ignore[misc]
    """The published SD3 velocity model, see `MMDiTNetwork`."""

    _repeated_blocks = ("JointBlock", "LastJointBlock")  # type: ignore[assignment]
    _no_split_modules = ("JointBlock", "LastJointBlock")  # type: ignore[assignment]
    __init__ = register_to_config(MMDiTNetwork.__init__)


class CausalVideoVAE(VAENetwork, ModelMixin, ConfigMixin):  # type: ignore[misc]
    """The published causal video VAE, see `VAENetwork`."""

    dtype = ModelMixin.dtype  # accounts for layerwise casting
    __init__ = register_to_config(VAENetwork.__init__)


TRANSFORMERS: dict[str, type[TransformerModel]] = {"miniflux": PyramidFluxTransformer, "sd3": PyramidDiffusionMMDiT}
"""By family."""

"""The stages of a render: plain classes whose constructor loads and whose call maps one batch."""

from pipeline.stages.decode import Decode
from pipeline.stages.encode import Encode
from pipeline.stages.publish import Publish
from pipeline.stages.sample import Sample
from pipeline.stages.stage import ModelConfig, Stage

STAGES = (Encode.name, Sample.name, Decode.name, Publish.name)
"""Names, in the order of the data."""

__all__ = ["STAGES", "Decode", "Encode", "ModelConfig", "Publish", "Sample", "Stage"]

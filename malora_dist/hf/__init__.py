"""The Hugging Face side: a PEFT tuner for the methods with a router, export to PEFT, evaluation. No megatron.

Importing this package registers the tuner with PEFT; that is this import's documented purpose, and
it has to come before PEFT reads a saved adapter::

    import malora_dist.hf
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained("my-adapter")

PEFT's own ``register_peft_method`` refuses names outside its enum, so the three tables behind it
are filled here.
"""

from typing import cast

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType

from malora_dist.hf.config import MaloraConfig, MaloraPeftType
from malora_dist.hf.layer import MaloraLayer
from malora_dist.hf.model import MaloraModel

__all__ = ["MaloraConfig", "MaloraLayer", "MaloraModel", "MaloraPeftType"]

_MALORA = cast(PeftType, MaloraPeftType.MALORA)
PEFT_TYPE_TO_CONFIG_MAPPING[_MALORA] = MaloraConfig
PEFT_TYPE_TO_TUNER_MAPPING[_MALORA] = MaloraModel
PEFT_TYPE_TO_PREFIX_MAPPING[_MALORA] = MaloraModel.prefix

"""A vision-language model of half a million parameters that reads drawn scenes: Q-Zoom's example, trained on a CPU.

Importing this registers the model with transformers' `AutoConfig` and `AutoModelForImageTextToText`.
"""

from multimodal.tiny_reader.model import TinyReaderConfig, TinyReaderForConditionalGeneration

__all__ = ["TinyReaderConfig", "TinyReaderForConditionalGeneration"]

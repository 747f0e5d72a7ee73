"""Tiny random models of many families, with their real model, processor and tokenizer classes, saved in their real
formats."""

from tests.zoo import llava, others, qwen  # noqa: F401  each enters its families
from tests.zoo.build import ZOO, Specimen, build, fit_codebook, picture, save

__all__ = ["ZOO", "Specimen", "build", "fit_codebook", "picture", "save"]

# SPDX-License-Identifier: Apache-2.0
"""Number formats by TransformerEngine, which is imported at first use. Written for its version 2.20."""

from collections.abc import Callable

import torch

from tokens.formats import Section


def te_scaling(section: Section):
    """TransformerEngine's recipe. Raises ValueError for arguments it does not have, or if it does not run here."""
    import transformer_engine.common.recipe as recipes
    from transformer_engine.pytorch.quantization import check_recipe_support

    arguments = dict(section["recipe_kwargs"] or {})
    if section["format"]:
        arguments[f"fp{section.bits}_format"] = recipes.Format[section["format"]]
    try:
        scaling = getattr(recipes, section.recipe)(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{section.as_given('recipe_kwargs')} does not fit: {reason}") from error
    try:
        check_recipe_support(scaling)  # CUDA and cuBLAS may be too old for it
    except RuntimeError as error:
        raise ValueError(f"{section.as_given()} does not run here: {error}") from error
    return scaling


def in_te_recipe(layer: torch.nn.Module, scaling) -> Callable:
    """A layer's forward pass in TransformerEngine's recipe; None: in BF16."""

    def in_recipe(*args, **kwargs):
        import transformer_engine.pytorch as te

        with te.autocast(enabled=scaling is not None, recipe=scaling):
            # Looked up now: FSDP2 has given the layer another class since, and activation checkpointing goes by that.
            return type(layer).forward(layer, *args, **kwargs)

    return in_recipe

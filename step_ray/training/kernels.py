"""Fused kernels in place of a model's own layers (`train.liger`).

Takes a Hugging Face model, changes its layers in place; says in time where that cannot be. The
output embedding and the loss stay those of headloss.py.
"""

from importlib import import_module
from typing import Any

from step_ray.errors import ConfigError


def check_liger(model_type: str) -> None:
    """Refuse an architecture or an environment that Liger's kernels are not for.

    Args:
        model_type: as in the model's config.json.

    Raises:
        ConfigError: see above.
    """
    known = _liger().MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in known:
        raise ConfigError(
            f"train.liger: Liger has no kernels for {model_type!r}; set train.liger=false"
        )


def use_liger(model: Any) -> None:
    """Put Liger's kernels into the norms, the rotary embedding and the MLPs of a model.

    Raises:
        ConfigError: see `check_liger`.
    """
    check_liger(model.config.model_type)
    _liger()._apply_liger_kernel_to_instance(
        model=model, cross_entropy=False, fused_linear_cross_entropy=False
    )


def _liger() -> Any:
    try:
        return import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as exc:
        raise ConfigError(
            "train.liger: liger-kernel cannot be loaded; pip install 'step-ray[liger]' beside torch"
            f" for CUDA, or set train.liger=false ({exc})"
        ) from exc

"""The served agent on vLLM: Ray's own OpenAI application, behind our keys and limits.

Takes `ServeArgs`, gives an application with the same routes as that of the engine `transformers`,
over vLLM's batching and prefix cache (vllm_ingress.py). A LoRA adapter is served on its base, which
is loaded as it is.
"""

from typing import Any, cast

from ray import serve

from step_ray.errors import ConfigError
from step_ray.serving.args import SESSION_ROUTING, ServeArgs
from step_ray.serving.config import ServeConfig
from step_ray.storage.places import url_of
from step_ray.training.model_files import adapter_base, adapter_config, is_adapter
from step_ray.training.student import resolve_init

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM makes room."""


def build_vllm_app(args: ServeArgs) -> serve.Application:
    """The application for `serve.run`.

    Raises:
        ConfigError: vLLM is not installed, the key's variable is not set, or vLLM cannot serve the
            adapter.
    """
    try:
        from ray.llm._internal.serve.core.configs.openai_api_models import to_model_metadata
        from ray.serve.llm import build_llm_deployment

        from step_ray.serving.vllm_ingress import AgentIngress
    except ImportError as exc:
        raise ConfigError(
            "serve.engine: 'vllm' is not installed; pip install 'step-ray[vllm]' or use"
            " 'transformers'"
        ) from exc
    config = _llm_config(args)
    options = AgentIngress.get_deployment_options([config])
    options["graceful_shutdown_timeout_s"] = args.drain_timeout_s
    name = args.served_name
    application = serve.deployment(AgentIngress, **options).bind(
        llm_deployments={name: build_llm_deployment(config)},
        model_cards={name: to_model_metadata(name, config)},
        config=ServeConfig(**args.model_dump(include=set(ServeConfig.model_fields))),
        key_digests=args.key_digests(),
        most_open=_most_open(args),
    )
    return cast(serve.Application, application)


def _most_open(args: ServeArgs) -> int:
    """Requests at once: in the batches of all replicas, and waiting; vLLM itself has no limit."""
    if args.max_queued_requests < 0:
        return -1
    return args.most_replicas * (args.max_batch_size + args.max_queued_requests)


def _llm_config(args: ServeArgs) -> Any:
    from ray.serve.llm import LLMConfig

    source = base = resolve_init(args.model_dir)
    if is_lora := is_adapter(source):
        base = resolve_init(adapter_base(source))
    # a request names the adapter; the name of its base is known to vLLM only
    base_name = f"{args.served_name}-base" if is_lora else args.served_name
    return LLMConfig(
        model_loading_config={
            "model_id": base_name,
            "model_source": base,
            "tokenizer_source": source,
        },
        engine_kwargs={
            "max_model_len": args.max_length,
            "dtype": args.dtype,
            "tensor_parallel_size": max(1, int(args.gpus_per_replica)),
            "max_num_seqs": args.max_batch_size,
            "enable_prefix_caching": True,
            # what vLLM compiles for a GPU it would compile for a CPU too, in minutes
            "enforce_eager": not args.gpus_per_replica,
            **(_lora_kwargs(args.served_name, source) if is_lora else {}),
        },
        # without GPUs Ray cannot tell the device by itself
        **_fetching(source, base),
        placement_group_config=None
        if args.gpus_per_replica
        else {"bundles": [{"CPU": args.cpus_per_replica}]},
        deployment_config={
            **args.replica_options(),
            "graceful_shutdown_timeout_s": args.drain_timeout_s,
            "request_router_config": SESSION_ROUTING,
            # the engine's workers are bundles of a placement group, and one selector is for all
            **(
                {"placement_group_bundle_label_selector": [args.node_labels]}
                if args.node_labels
                else {}
            ),
        },
    )


def _fetching(*sources: str) -> dict[str, Any]:
    """Callback by which replicas on other nodes find what lies in a store, under the same path.

    The cache folder ($STEP_RAY_CACHE) is therefore the same on all nodes.
    """
    places = sorted({url for source in sources if (url := url_of(source))})
    if not places:
        return {}
    return {
        "callback_config": {
            "callback_class": "step_ray.serving.vllm_fetch.FetchModels",
            "callback_kwargs": {"places": places},
        }
    }


def _lora_kwargs(served_name: str, source: str) -> dict[str, Any]:
    """What vLLM needs to serve one adapter under a name of its own.

    Raises:
        ConfigError: the adapter's rank is above those of vLLM.
    """
    from vllm.entrypoints.openai.models.protocol import LoRAModulePath

    rank = int(adapter_config(source)["r"])
    fitting = [most for most in LORA_RANKS if most >= rank]
    if not fitting:
        raise ConfigError(
            f"model_dir: the adapter has rank {rank}, 'vllm' takes {LORA_RANKS[-1]} at most; use"
            " 'transformers', or export 'merged'"
        )
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": fitting[0],
        "lora_modules": [LoRAModulePath(name=served_name, path=source)],
        # where a turn ends is said by the adapter's export
        "generation_config": source,
    }

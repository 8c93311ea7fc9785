"""Routers and their experts, as configs describe them."""

from dataclasses import replace

from builder_svc.models.config import DecoderConfig, ExpertsSpec, MlpSpec
from builder_svc.models.fields import Fields
from engine.errors import InvalidArgument, Unimplemented


def experts_spec(config: Fields, intermediate_size: int, normalize: bool, shared: MlpSpec | None = None) -> ExpertsSpec:
    """`num_experts` or `num_local_experts`, of which `num_experts_per_tok` are chosen.

    Args:
        intermediate_size: of each.
        normalize, shared: as in ExpertsSpec.

    Raises:
        InvalidArgument: more are chosen than there are.
        Unimplemented: another activation than silu.
    """
    either = "num_experts" if config.values.get("num_experts") is not None else "num_local_experts"
    count, top_k = config.size(either), config.size("num_experts_per_tok")
    if top_k > count:
        raise InvalidArgument(
            f"{config.where}: num_experts_per_tok is {top_k}, more than {either} {count}: a token has at most all of them",
            reason="CONFIG_FIELD_INVALID",
        )
    if (activation := config.get("hidden_act", str, "silu")) != "silu":
        raise Unimplemented(
            f"{config.where}: hidden_act {activation!r} is not supported for experts; supported is silu",
            reason="ACTIVATION_UNSUPPORTED",
        )
    return ExpertsSpec(count, top_k, intermediate_size, normalize, shared)


def with_sparse_layers(config: Fields, decoder: DecoderConfig, experts: ExpertsSpec) -> DecoderConfig:
    """The decoder with experts in every `decoder_sparse_step`-th layer but those in `mlp_only_layers`.

    Raises:
        InvalidArgument: an entry of `mlp_only_layers` is no layer's number.
    """
    dense, step, count = (
        config.get("mlp_only_layers", list, []),
        config.size("decoder_sparse_step", 1),
        len(decoder.layers),
    )
    for index in dense:
        if type(index) is not int or not 0 <= index < count:
            raise InvalidArgument(
                f"{config.where}: 'mlp_only_layers' has {index!r}, expected numbers of layers from 0 to {count - 1}",
                reason="CONFIG_FIELD_INVALID",
            )
    layers = tuple(
        layer if index in dense or (index + 1) % step else replace(layer, mlp=experts)
        for index, layer in enumerate(decoder.layers)
    )
    return replace(decoder, layers=layers)

"""The command line of `headrace quantize`, and the way through the layers.

Only one layer's weights and the residual streams of the calibration text are in memory: those of
the model as it is being rounded, and those of the model as it was. A layer that an earlier run has
written is read instead of made, so a run that was cut short goes on.
"""

# T tokens · D width · X inputs

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headrace.errors import ConfigError, HeadraceError
from headrace.models import HfConfig, ModelSpec, spec_of
from headrace.quantize.checkpoint import Source, Target, packed, settings_of, unpacked
from headrace.quantize.dense import STAGES, DenseBlock
from headrace.quantize.gptq import Options, corrected, quantize

GROUPS = (-1, 32, 64, 128)
# Stages whose outputs are added to the residual stream.
ADDING = (1, 3)
# A token whose embedding is zero counts as one that is this small.
STREAM_MIN = 1e-6
# How near weights stay to what they were when they make up for the layers before (`corrected`).
RIDGE = 1.0
_LAYERS = "model.layers."
_EMBEDDING = "model.embed_tokens.weight"

# From a model's id and its revision to its folder.
Resolve = Callable[[str, str | None], Path]


def main(argv: Sequence[str], resolve: Resolve, program: str = "headrace quantize") -> int:
    """Quantizes a checkpoint; returns the exit status."""
    arguments = _parser(program).parse_args(argv)
    try:
        _check(arguments)
        run(
            resolve(arguments.model_id, arguments.revision),
            arguments.output_dir,
            arguments.dataset,
            Options(arguments.groupsize, arguments.act_order, arguments.sym, arguments.percdamp),
            samples=arguments.samples,
            length=arguments.length,
            device=_device(arguments.device),
        )
    except (HeadraceError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Quantize a model to four bits by GPTQ, in AutoGPTQ's format. A run that is "
        "cut short goes on where it was when it is started again.",
    )
    parser.add_argument("model_id", metavar="MODEL", help="Hub id or folder")
    parser.add_argument("output_dir", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument(
        "--dataset", type=Path, help="file of text like that which the model will read and write"
    )
    parser.add_argument(
        "--groupsize", type=int, default=128, help="inputs that share a scale, -1: all [128]"
    )
    parser.add_argument("--act-order", action="store_true", help="take large inputs first")
    parser.add_argument(
        "--sym", action=argparse.BooleanOptionalAction, default=False, help="no zero points"
    )
    parser.add_argument(
        "--percdamp", type=float, default=0.01, help="damping, as a share of the mean [0.01]"
    )
    parser.add_argument("--samples", type=int, default=128, help="pieces of the text [128]")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a piece [2048]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    # Of TGI's command.
    parser.add_argument("--upload-to-model-id", help="not done: upload the folder by `hf upload`")
    parser.add_argument("--trust-remote-code", action="store_true", help="without effect")
    parser.add_argument("--logger-level", default="INFO", help="without effect")
    parser.add_argument("--json-output", action="store_true", help="without effect")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if arguments.dataset is None:
        raise ConfigError(
            "--dataset FILE is needed: some 100 kB of text like that which the model will read"
        )
    if arguments.upload_to_model_id:
        raise ConfigError("--upload-to-model-id: nothing is uploaded; do it by `hf upload`")
    if arguments.groupsize not in GROUPS:
        raise ConfigError(f"--groupsize must be one of {GROUPS}, it is {arguments.groupsize}")
    if not 0 < arguments.percdamp < 1:
        raise ConfigError(f"--percdamp must lie between 0 and 1, it is {arguments.percdamp}")
    for flag in ("samples", "length"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag} must be at least 1, it is {getattr(arguments, flag)}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


@torch.inference_mode()
def run(
    model: Path,
    out: Path,
    dataset: Path,
    options: Options,
    *,
    samples: int,
    length: int,
    device: torch.device,
) -> None:
    """Quantizes the model of a folder; a ConfigError says what cannot be."""
    hf = HfConfig.read(model)
    spec = spec_of(hf)
    if hf.values.get("quantization_config"):
        raise ConfigError(f"{model} is quantized already")
    check_group(spec, options.group)
    tokens = read_tokens(model, dataset, samples, min(length, spec.context_tokens_max))
    text = hashlib.sha256(repr([t.tolist() for t in tokens]).encode()).hexdigest()
    source = Source(model)
    settings = {**settings_of(options), "model": str(model), "text": text, "ridge": RIDGE}
    target = Target(out, spec.layers, settings)
    embedding_VD = source.read(_EMBEDDING)
    # Between layers the streams wait on the host.
    streams = [embedding_VD[piece].float() for piece in tokens]
    exact = [stream_TD.clone() for stream_TD in streams]
    del embedding_VD
    begin = time.monotonic()
    for layer in range(spec.layers):
        error, resumed = _layer(spec, layer, source, target, options, streams, exact, device)
        passed = time.monotonic() - begin
        left = passed / (layer + 1) * (spec.layers - layer - 1)
        what = "read, as an earlier run left it" if resumed else f"error {error:.4f}"
        print(
            f"layer {layer + 1} of {spec.layers}: {what}; {passed:.0f} s, {left:.0f} s to go",
            file=sys.stderr,
            flush=True,
        )
    target.save(spec.layers, {name: source.read(name) for name in source.others(_LAYERS)})
    target.finish(source, options)
    print(f"{out}: {samples_of(tokens)}", file=sys.stderr)


def samples_of(tokens: list[Tensor]) -> str:
    """Says how much text there was."""
    return f"calibrated on {len(tokens)} pieces, {sum(len(t) for t in tokens)} tokens"


def check_group(spec: ModelSpec, group: int) -> None:
    """Refuses groups that do not divide the inputs of all layers."""
    if group == -1:
        return
    inputs = {spec.width, spec.mlp_width, spec.heads * spec.head_dim}
    for size in sorted(inputs):
        if size % group != 0:
            fitting = [g for g in GROUPS if g > 0 and all(n % g == 0 for n in inputs)]
            better = " or ".join(map(str, [*fitting, -1]))
            raise ConfigError(
                f"--groupsize {group}: {size} inputs of a layer do not divide by it; take {better}"
            )


def read_tokens(model: Path, dataset: Path, samples: int, length: int) -> list[Tensor]:
    """Returns evenly spaced pieces of a text, int64; fewer and shorter ones of a short text."""
    from tokenizers import Tokenizer

    path = model / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path} is missing: the text cannot be made into tokens")
    text = dataset.read_text(encoding="utf-8", errors="replace")
    ids = torch.tensor(Tokenizer.from_file(str(path)).encode(text, add_special_tokens=False).ids)
    if len(ids) == 0:
        raise ConfigError(f"{dataset} holds no text")
    length = min(length, len(ids))
    count = min(samples, len(ids) // length)
    starts = torch.linspace(0, len(ids) - length, count).long().tolist()
    return [ids[start : start + length] for start in starts]


def _layer(
    spec: ModelSpec,
    layer: int,
    source: Source,
    target: Target,
    options: Options,
    streams: list[Tensor],
    exact: list[Tensor],
    device: torch.device,
) -> tuple[float, bool]:
    """Quantizes a layer and takes the streams through it, and the exact ones through what it was.

    Returns: the squared error of its weights as a share of their squares; whether it was there.
    """
    prefix = f"{_LAYERS}{layer}."
    stored = {name.removeprefix(prefix): source.read(name) for name in source.names(prefix)}
    tensors = {k: v.to(device).float() for k, v in stored.items()}
    block, unrounded = DenseBlock(spec, layer, dict(tensors)), DenseBlock(spec, layer, tensors)
    before = target.load(layer)
    made: dict[str, Tensor] = {}
    wrong = whole = 0.0
    for stage, names in enumerate(STAGES):
        inputs = [block.inputs(stage, x_TD.to(device)) for x_TD in streams]
        moments_XX = crossed_XX = None
        for i, (x_TD, exact_TD) in enumerate(zip(streams, exact, strict=True)):
            given, had = inputs[i], unrounded.inputs(stage, exact_TD.to(device))
            if stage in ADDING:
                exact_TD.add_(unrounded.linear(had, names[0]).cpu())
            if before is None:
                if stage in ADDING:
                    given, had = as_it_counts(given, x_TD), as_it_counts(had, x_TD)
                moments_XX = added(moments_XX, given, given)
                crossed_XX = added(crossed_XX, had, given)
        weights = [block.tensors[f"{name}.weight"] for name in names]
        if moments_XX is not None and crossed_XX is not None:
            # Layers of a stage have their inputs, and so what is solved, in common.
            wanted_YX = corrected(torch.cat(weights), moments_XX, crossed_XX, RIDGE)
            weights = wanted_YX.split([len(weight_YX) for weight_YX in weights])
        for name, weight_YX in zip(names, weights, strict=True):
            if before is not None:
                leaves = ("qweight", "qzeros", "scales", "g_idx")
                parts = {leaf: before[f"{prefix}{name}.{leaf}"].to(device) for leaf in leaves}
                rounded = unpacked(parts).dequantize()
            else:
                assert moments_XX is not None
                result = quantize(weight_YX, moments_XX.clone(), options)
                made |= {f"{name}.{leaf}": value for leaf, value in packed(result).items()}
                rounded = result.dequantize()
            wrong += float((rounded - weight_YX).square().sum())
            whole += float(weight_YX.square().sum())
            block.tensors[f"{name}.weight"] = rounded
        if stage in ADDING:
            for x_TD, given in zip(streams, inputs, strict=True):
                x_TD.add_(block.linear(given, names[0]).cpu())
    if before is None:
        linear = {f"{name}.weight" for names in STAGES for name in names}
        made |= {name: value for name, value in stored.items() if name not in linear}
        target.save(layer, {prefix + name: value for name, value in made.items()})
    return wrong / whole, before is not None


def as_it_counts(inputs_TX: Tensor, stream_TD: Tensor) -> Tensor:
    """Returns what a layer is given that adds to the residual stream, each token over its stream's
    root mean square.

    What is added wrongly counts by what it is added to, since the next norm divides by that. The
    first tokens of a text have streams, and inputs of `down_proj`, some hundred times as large as
    others (Sun et al., "Massive Activations in Large Language Models", 2024): unweighted, these few
    are nearly all that the moments consist of.
    """
    rms_T = stream_TD.square().mean(dim=1).sqrt().clamp(min=STREAM_MIN)
    return inputs_TX / rms_T.to(inputs_TX.device)[:, None]


def added(total_XX: Tensor | None, left_TX: Tensor, right_TX: Tensor) -> Tensor:
    """Returns the sum so far and that of l rᵀ over some tokens, float32 [X, X]."""
    if total_XX is None:
        return left_TX.T @ right_TX
    return total_XX.addmm_(left_TX.T, right_TX)

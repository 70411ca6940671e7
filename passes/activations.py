"""squareq.int8_linear(x, ..., "w8a8")  ->  xq, sx = squareq.quantize_rows(x); squareq.int8_matmul(xq, sx, ...)"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import fx

from squareq_fx import ops
from squareq_fx.compute import Compute
from squareq_fx.edit import call, finish, replace
from squareq_fx.errors import PassError
from squareq_fx.ir import Level, clone, functions, info, layers, model_source
from squareq_fx.kernels.arguments import COMPUTES

__all__ = ["Activations"]


@dataclass(frozen=True)
class Activations:
    """Layers that compute in w8a8 show their two halves: the quantised activations, and the product of int8 with int8.

        to_q_rows = squareq.quantize_rows(norm)                          # one scale a row, amax / 127
        to_q_xq, to_q_sx = to_q_rows[0], to_q_rows[1]                    # i8[b, s, 3072], f32[b, s, 2]
        to_q = squareq.int8_matmul(to_q_xq, to_q_sx, to_q_qweight, to_q_scale, to_q_zero_point, to_q_bias, torch.bfloat16)

    So layers that read one input can share its quantisation, and what follows a product can move into it (`fuse`).

    Args:
        backward: how `int8_linear_dx` of those layers computes; the others stay in 16 bits. "w8a8" folds the weight's scales
            into dy and quantises that row by row. On the test suite's tiny Flux and SDXL (random weights, float32, batch 2,
            rank 4 on every layer) that alone changed the adapters' gradients by 0.6 and 1.2 % in the median, at most 1.9 and
            3.9 % (relative L2); the forward in w8a8 had changed them by 1.1 and 2.1 %, at most 2.3 and 4.5 %, cosine at least
            0.999. Gradients of trained models may have heavier tails; it is off unless asked for.

    Requires: a graph with int8 layers, in functions or flat; after `differentiate`, which knows `int8_linear` only.
    Preserves: signature, every shape and dtype, every value of the forward bit for bit; with `backward="w8a16"` every gradient.

    Raises:
        PassError: `backward` is no way to compute.

    Source: LLM.int8() (arXiv 2208.07339), section 2.1: vector-wise quantisation, one scale for each row of the activations.
    """

    backward: Compute = "w8a16"

    name = "activations"
    requires_level = Level.QUANTIZED

    def __post_init__(self) -> None:
        if self.backward not in COMPUTES:
            raise PassError(f"activations: backward={self.backward!r} is none of {', '.join(COMPUTES)}")

    def __call__(self, gm: fx.GraphModule) -> fx.GraphModule:
        gm = clone(gm)
        graphs = (gm, *functions(gm).values())
        in_int8 = [n for graph in graphs for n in graph.graph.nodes if _is_w8a8(n) or n.target is ops.int8_matmul]
        int8_layers = {name for node in in_int8 for name in layers(node)}
        for graph in graphs:
            for node in list(graph.graph.nodes):
                if _is_w8a8(node):
                    self._split(node)
                elif node.target is ops.int8_linear_dx and self.backward == "w8a8" and info(node).layer in int8_layers:
                    node.args = (*node.args[:5], self.backward)
            finish(graph)
        return gm

    def ensures(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """No layer hides its quantisation, and every product reads the values and scales of one `quantize_rows`.

        Raises:
            PassError: naming the layer.
        """
        for graph in (after, *functions(after).values()):
            for node in graph.graph.nodes:
                if _is_w8a8(node):
                    raise PassError(f"layer {info(node).layer} computes in w8a8 without a quantize_rows of its own")
                if node.target is ops.int8_matmul and not _reads_one_quantisation(node):
                    what = f"layer {info(node).layer}: its xq and sx are not of one quantize_rows"
                    raise PassError(f"{what}\n  model source: {model_source(node)}")

    def _split(self, node: fx.Node) -> None:
        x, *weights = node.args[:5]
        layer, name = info(node).layer, node.name
        how = {"like": node, "made_by": self.name, "layer": layer}
        with node.graph.inserting_before(node):
            rows = call(node.graph, ops.quantize_rows, (x,), name=f"{name}_rows", **how)  # type: ignore[arg-type]
            xq = call(node.graph, operator.getitem, (rows, 0), name=f"{name}_xq", **how)  # type: ignore[arg-type]
            sx = call(node.graph, operator.getitem, (rows, 1), name=f"{name}_sx", **how)  # type: ignore[arg-type]
            product = call(
                node.graph,
                ops.int8_matmul,
                (xq, sx, *weights, node.meta["val"].dtype),
                name=f"{name}_product",
                **how,  # type: ignore[arg-type]
            )
        replace(node, product)
        product.name = name


def _is_w8a8(node: fx.Node) -> bool:
    return node.target is ops.int8_linear and len(node.args) > 5 and node.args[5] == "w8a8"


def _reads_one_quantisation(node: fx.Node) -> bool:
    sources = []
    for index, argument in enumerate(node.args[:2]):
        if not (isinstance(argument, fx.Node) and argument.target is operator.getitem and argument.args[1] == index):
            return False
        sources.append(argument.args[0])
    return sources[0] is sources[1] and getattr(sources[0], "target", None) is ops.quantize_rows

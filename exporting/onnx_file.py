"""A traced program as an ONNX file, and the same with 8-bit weights."""

import contextlib
import io
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import torch
from torch.export import ExportedProgram

from utils.errors import UserError, first_line

from .program import INPUT, OUTPUT

OPSETS = range(18, 22)  # those that are tested
MOST_BYTES = 2_000_000_000  # of one file

logging.getLogger("onnx_ir").setLevel(logging.WARNING)  # it tells of every constant that it merges
logging.getLogger("onnxscript").setLevel(logging.WARNING)


def to_onnx(program: ExportedProgram, opset: int, texts: Mapping[str, str]) -> onnx.ModelProto:
    """The program in standard operators of an opset, with texts as metadata.

    Raises UserError for a program that does not fit the opset.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            converted = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError) as error:
        while error.__cause__ is not None:
            error = error.__cause__
        raise UserError(f"the model does not fit ONNX opset {opset}: {first_line(error)}") from None
    model = converted.model_proto
    written = {each.domain: each.version for each in model.opset_import}
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if written.get("", written.get("ai.onnx")) != opset or foreign:
        raise UserError(
            f"the model does not fit ONNX opset {opset}: PyTorch wrote {written}; try --opset "
            f"{OPSETS[0]}"
        )
    onnx.helper.set_model_props(model, dict(texts))
    _rename_size(model.graph, model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "batch")
    return model


def _rename_size(graph: onnx.GraphProto, name: str, new_name: str) -> None:
    """A size that is no number, which PyTorch calls s77 or so, in a graph and those in it."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == name:
                size.dim_param = new_name
    for node in graph.node:
        for attribute in node.attribute:
            _rename_size(attribute.g, name, new_name)


def with_int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with the weights of its products in 8 bits, a scale for each output channel; what
    they are multiplied by is rounded to 8 bits anew for every call.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    before = logging.root.level
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model, source)
        logging.root.setLevel(logging.ERROR)  # it recommends a step that is not needed here
        try:
            quantize_dynamic(
                source,
                target,
                weight_type=QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gemm"],
                extra_options={"EnableSubgraph": True, "MatMulConstBOnly": True},
            )
        finally:
            logging.root.setLevel(before)
        quantised = onnx.load(target)
    texts = {each.key: each.value for each in model.metadata_props}
    onnx.helper.set_model_props(quantised, texts)
    return quantised

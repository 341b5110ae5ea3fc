"""The waves of the timestep's embedding, which a graph computes in float32 though the rest of it is in bfloat16.

A timestep of 501 is 502 in bfloat16, and its sine and cosine are another angle's: everything after them would be of another
step. The waves themselves, numbers from -1 to 1, may be rounded.
"""

from typing import Any

__all__ = ["WAVE", "split_waves"]

WAVE = "wave."
"""How the names of the inputs begin that waves become."""


def split_waves(model: Any) -> Any | None:
    """Cut a graph behind its sines and cosines: they become inputs, and a model of its own makes them.

    Args:
        model: an ``openvino.Model``, which is changed: it takes ``wave.0``, ``wave.1``, ... beside its other inputs.

    Returns:
        The model that makes them, in their order; None where there are none.
    """
    from openvino import Model, opset13

    waves = [node.output(0) for node in model.get_ordered_ops() if node.get_type_name() in {"Sin", "Cos"}]
    if not waves:
        return None
    inputs = []
    for number, wave in enumerate(waves):
        made = opset13.parameter(wave.get_partial_shape(), wave.get_element_type())
        made.output(0).get_tensor().set_names({f"{WAVE}{number}"})
        for reader in wave.get_target_inputs():
            reader.replace_source_output(made.output(0))
        inputs.append(made)
    model.add_parameters(inputs)
    return Model([opset13.result(wave) for wave in waves], _parameters(waves), "waves")


def _parameters(outputs: list[Any]) -> list[Any]:
    """The inputs of a graph that these outputs are made from."""
    found: dict[str, Any] = {}
    seen, todo = set[str](), [output.get_node() for output in outputs]
    while todo:
        node = todo.pop()
        name = node.get_name()  # of a node within its process; Python's objects of it are made anew
        if name not in seen:
            seen.add(name)
            todo += [source.get_source_output().get_node() for source in node.inputs()]
            if node.get_type_name() == "Parameter":
                found[name] = node
    return list(found.values())

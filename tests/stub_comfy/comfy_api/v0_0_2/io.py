# SPDX-License-Identifier: Apache-2.0
"""Node schemas. An argument that the oldest supported host does not take is a TypeError here too."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

__all__ = [
    "AnyType",
    "Audio",
    "Boolean",
    "Clip",
    "Combo",
    "ComfyNode",
    "Conditioning",
    "Float",
    "Hidden",
    "Image",
    "Input",
    "Int",
    "Latent",
    "Mask",
    "Model",
    "NodeOutput",
    "NumberDisplay",
    "Output",
    "Schema",
    "Sigmas",
    "String",
    "Vae",
    "Video",
]


def _given(**values):
    return {name: value for name, value in values.items() if value is not None}


class NumberDisplay(str, Enum):
    number = "number"
    slider = "slider"


class Hidden(str, Enum):
    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"


class Input:
    io_type = None

    def __init__(
        self,
        id,
        display_name=None,
        optional=False,
        tooltip=None,
        lazy=None,
        extra_dict=None,
        raw_link=None,
        advanced=None,
    ):
        self.id, self.display_name, self.optional, self.tooltip = id, display_name, optional, tooltip
        self.lazy, self.rawLink, self.advanced = lazy, raw_link, advanced
        self.extra_dict = extra_dict or {}

    def as_dict(self):
        common = _given(
            display_name=self.display_name, optional=self.optional, tooltip=self.tooltip, advanced=self.advanced
        )
        return common | _given(lazy=self.lazy, rawLink=self.rawLink) | self.extra_dict

    def get_io_type(self):
        return self.io_type


class Output:
    io_type = None

    def __init__(self, id=None, display_name=None, tooltip=None, is_output_list=False):
        self.id, self.display_name, self.tooltip = id, display_name or id, tooltip
        self.is_output_list = is_output_list


def _socket(name):
    """A type with a plain input and a plain output."""
    input_class = type("Input", (Input,), {"io_type": name, "__module__": __name__})
    output_class = type("Output", (Output,), {"io_type": name, "__module__": __name__})
    return type(name, (), {"io_type": name, "Input": input_class, "Output": output_class, "__module__": __name__})


AnyType = _socket("*")
Audio = _socket("AUDIO")
Clip = _socket("CLIP")
Conditioning = _socket("CONDITIONING")
Image = _socket("IMAGE")
Latent = _socket("LATENT")
Mask = _socket("MASK")
Model = _socket("MODEL")
Sigmas = _socket("SIGMAS")
Vae = _socket("VAE")
Video = _socket("VIDEO")


_COMMON = {
    "display_name": None,
    "optional": False,
    "tooltip": None,
    "lazy": None,
    "default": None,
    "socketless": None,
    "extra_dict": None,
    "raw_link": None,
    "advanced": None,
}
_SPELLED = {
    "raw_link": "rawLink",
    "force_input": "forceInput",
    "display_mode": "display",
    "dynamic_prompts": "dynamicPrompts",
}


def _widget(name, second=(), **own):
    """A type whose Input takes ``id`` and ``second`` by position, the common and its ``own`` arguments by name."""
    named = _COMMON | own
    parameters = [inspect.Parameter("id", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    parameters += [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in second]
    parameters += [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=d) for n, d in named.items()]
    signature = inspect.Signature(parameters)

    class TypedInput(Input):
        __signature__ = signature
        io_type = name

        def __init__(self, *args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            self._values = bound.arguments
            self.__dict__.update(self._values)

        def as_dict(self):
            values = {_SPELLED.get(n, n): getattr(v, "value", v) for n, v in self._values.items()}
            del values["id"]
            extra = values.pop("extra_dict") or {}
            return _given(**values) | extra

    TypedInput.__name__ = "Input"
    return type(name, (_socket(name),), {"Input": TypedInput, "__module__": __name__})


_NUMBER = {"min": None, "max": None, "step": None, "display_mode": None, "force_input": None}
Boolean = _widget("BOOLEAN", label_on=None, label_off=None, force_input=None)
Combo = _widget("COMBO", second=("options",), control_after_generate=None)
Float = _widget("FLOAT", round=None, **_NUMBER)
Int = _widget("INT", control_after_generate=None, **_NUMBER)
String = _widget("STRING", multiline=False, placeholder=None, force_input=None, dynamic_prompts=None)


@dataclass
class Schema:
    node_id: str
    display_name: str = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    search_aliases: list[str] = field(default_factory=list)
    is_input_list: bool = field(default=False, kw_only=True)
    is_output_node: bool = field(default=False, kw_only=True)
    is_deprecated: bool = field(default=False, kw_only=True)
    is_experimental: bool = field(default=False, kw_only=True)
    not_idempotent: bool = field(default=False, kw_only=True)
    enable_expand: bool = field(default=False, kw_only=True)

    def validate(self):
        """Raises ValueError unless the ids are unique."""
        for what, ports in (("Input", self.inputs), ("Output", self.outputs)):
            ids = [port.id for port in ports if port.id is not None]
            if len(set(ids)) != len(ids):
                raise ValueError(f"{what} ids must be unique, but {ids} are not.")


class NodeOutput:
    def __init__(self, *args, ui=None, expand=None, block_execution=None):
        self.args, self.ui, self.expand, self.block_execution = args, ui, expand, block_execution

    @property
    def result(self):
        return self.args or None

    def __getitem__(self, index):
        return self.args[index]


class ComfyNode:
    """Base of all nodes; ``hidden`` holds what the schema asked for while the host executes the node."""

    hidden: Any = None

    @classmethod
    def define_schema(cls):
        """The node's Schema."""

    @classmethod
    def execute(cls, **kwargs):
        """The node's work."""

    @classmethod
    def GET_SCHEMA(cls):
        schema = cls.define_schema()
        schema.validate()
        return schema

    @classmethod
    def INPUT_TYPES(cls):
        """The schema in the form that /object_info shows."""
        found = {"required": {}}
        for port in cls.GET_SCHEMA().inputs:
            options = port.as_dict()
            kind = "optional" if options.pop("optional", False) else "required"
            found.setdefault(kind, {})[port.id] = (port.get_io_type(), options)
        return found

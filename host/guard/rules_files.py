# SPDX-License-Identifier: Apache-2.0
"""The guard's rule on files that are not there: an NVFP4 file that can be made from a checkpoint that is."""

from __future__ import annotations

from collections.abc import Iterator

from ..files import source_of
from .files import FileFacts, file_facts, find_file
from .fixes import Value, fixes_of
from .loaders import MODEL_LOADERS, OUR_MODEL_LOADER, OUR_VAE_LOADER, VAE_LOADERS
from .view import ERROR, Finding, View, ids_of

OUR_TEXT_LOADER = "NVFP4TextEncoderLoader"
_LONGEST_NAME = 300
MAKE = "make"  # the finding's action: its fixes are set, and the prompt is queued again


def unmade(view: View) -> Iterator[Finding]:
    """A file of NVFP4 Model Loader that is not there, while the same model is, in a format that it can be made from."""
    folders = MODEL_LOADERS[OUR_MODEL_LOADER].folders
    for loader in view.graph.of_kind(OUR_MODEL_LOADER):
        view.keep_time()
        name = view.graph.value(loader.id, "model_name")
        if not isinstance(name, str) or len(name) > _LONGEST_NAME or find_file(name, folders) is not None:
            continue
        source = source_of(name, folders)
        if source is None:
            continue
        wanted = [(loader.id, "model_name", source), (loader.id, "make_nvfp4", True), *_other_parts(view, name, source)]
        yield Finding(
            "unmade",
            ERROR,
            f"{name} is not there, but {source} is, the same model by its name.",
            "NVFP4 Model Loader can write the NVFP4 file from it: once, which takes minutes and shows how far it is. "
            "Ever after it is found again.",
            f"Choose {source} in its place and switch `make_nvfp4` on.",
            ids_of(loader),
            fixes_of(view.graph, wanted),
            MAKE,
        )


def _other_parts(view: View, name: str, source: str) -> Iterator[tuple[str, str, Value]]:
    """What else the prompt takes from the missing file, where the source has it as well."""
    facts = file_facts(source, VAE_LOADERS[OUR_VAE_LOADER].folders)
    for kind, given in ((OUR_VAE_LOADER, "vae_name"), (OUR_TEXT_LOADER, "projection")):
        for node in view.graph.of_kind(kind):
            if view.graph.value(node.id, given) == name and _has_vaes(facts):
                yield node.id, given, source


def _has_vaes(facts: FileFacts | None) -> bool:
    """Whether it is a full checkpoint, which has the text projection too."""
    return facts is not None and (facts.full_vae or facts.sound is not None)

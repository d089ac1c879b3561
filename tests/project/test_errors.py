from __future__ import annotations

import inspect

import pytest

from edge_memllm import errors


def test_tree_is_exactly_the_documented_one() -> None:
    classes = {
        name: value.__bases__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
        if value.__module__ == errors.__name__
    }
    assert classes == {
        "EdgeMemLLMError": (Exception,),
        "ArtifactError": (errors.EdgeMemLLMError,),
        "CorruptionError": (errors.ArtifactError,),
        "StorageError": (errors.EdgeMemLLMError,),
        "ExportError": (errors.EdgeMemLLMError,),
        "RuntimeUnavailableError": (errors.EdgeMemLLMError,),
        "RequestError": (errors.EdgeMemLLMError, ValueError),
        "RecipeError": (errors.EdgeMemLLMError, ValueError),
        "GenerationCancelledError": (errors.EdgeMemLLMError,),
        "ServiceError": (errors.EdgeMemLLMError,),
        "QueueFullError": (errors.ServiceError,),
        "DeadlineError": (errors.ServiceError,),
        "DrainingError": (errors.ServiceError,),
    }
    assert errors.__doc__ is not None
    assert all(name in errors.__doc__ for name in classes)


def test_missing_extra_names_the_install_command() -> None:
    with pytest.raises(
        errors.RuntimeUnavailableError,
        match=r"'torch', which is not installed\. Install it: pip install '\.\[export\]' in a "
        r"clone of edge-memllm, or with its wheel pip install 'FILE\.whl\[export\]'$",
    ):
        raise errors.missing_extra("torch", "export")

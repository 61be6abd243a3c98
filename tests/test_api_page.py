"""docs/api.md is what the docstrings say now."""

import importlib.util
from pathlib import Path

import fusedres

DOCS = Path(__file__).parents[1] / "docs"
_spec = importlib.util.spec_from_file_location("api", DOCS / "api.py")
api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(api)


def test_the_page_is_up_to_date():
    assert (DOCS / "api.md").read_text() == api.page(), "run `make api`"


def test_every_public_name_has_its_entry():
    page = api.page()
    callables = [name for name in fusedres.__all__ if callable(getattr(fusedres, name))]
    assert callables and all(f"## fusedres.{name}\n" in page for name in callables)
    assert "## fusedres.ops.bn_act\n" in page and "| `bench` |" in page


def test_arguments_become_a_list_and_examples_code():
    docstring = "Say.\n\nArgs:\n    a, b: what\n        and why.\n    c: more.\n\n>>> f()\n1\n\nEnd."
    expected = "Say.||Arguments:||- `a, b`: what|  and why.|- `c`: more.||```python|>>> f()|1|```||End."
    assert "|".join(api.markdown(docstring)) == expected

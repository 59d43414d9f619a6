"""YAML as people write it: keys in the given order, shell scripts as blocks, a comment above."""

from __future__ import annotations

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)  # the items of a list stand below its key, indented


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def dump(comment: str, *documents: Any) -> str:
    """The documents, below the comment."""
    head = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    texts = (yaml.dump(d, Dumper=_Dumper, sort_keys=False, width=100_000, allow_unicode=True) for d in documents)
    return head + "---\n".join(texts)

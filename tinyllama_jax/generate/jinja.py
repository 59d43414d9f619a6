"""A template as the Jinja text by which other programs write dialogues: transformers, vLLM, llama.cpp."""

from __future__ import annotations

import json

from tinyllama_jax.generate.templates import ROLES, Control, Template


def jinja(template: Template, system: str | None = None, *, bos: bool = False) -> str:
    """What `Chat` writes, as a chat template; "" for the template `none`, which is no dialogue's.

    system: the system message of dialogues that have none.  bos: documents begin with BOS, which such programs put
    before no dialogue of themselves.
    """
    if template.name == "none":
        return ""
    content = "m['content'] | trim" if template.strips else "m['content']"
    text = "{{ bos_token }}" if bos else ""
    if system is not None:
        turn = _turn(template, "system", _quoted(system))
        text += "{% if messages[0]['role'] != 'system' %}" + turn + "{% endif %}"
    text += "{% for m in messages %}"
    for place, role in enumerate(ROLES):
        text += ("{% elif" if place else "{% if") + f" m['role'] == '{role}' %}}"
        if not template.roles[place]:
            text += "{{ raise_exception('there are no messages of the " + role + "') }}"
            continue
        text += _turn(template, role, content)
    text += "{% endif %}{% endfor %}"
    opening = "".join(map(_part, template.opening))
    return text + "{% if add_generation_prompt %}" + opening + "{% endif %}"


def _turn(template: Template, role: str, content: str) -> str:
    """content: the expression that gives it."""
    asked = template.asked[0] if role == "user" else ""
    parts = []
    for part in (asked,) if asked else template.turn:
        if isinstance(part, Control):
            parts.append(_part(part))
            continue
        before, found, after = part.replace("{role}", template.roles[ROLES.index(role)]).partition("{content}")
        parts += [_part(before), "{{ " + content + " }}" if found else "", _part(after)]
    return "".join(parts)


def _part(part: str | Control) -> str:
    if isinstance(part, Control) and not part.text:
        return "{{ eos_token }}"
    text = part.text if isinstance(part, Control) else part
    return "{{ " + _quoted(text) + " }}" if text else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)

"""What rows say: the text of a field, whatever its form, and whether messages stand in a usual order."""

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from rlloss._checks import nearest

__all__ = ["answer", "content_key", "unusual_order", "written"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ai": "assistant"}


def unusual_order(name: str, row: Mapping[str, Any]) -> Iterator[str]:
    """What is unusual about the roles of one column; at most one thing."""
    messages = row.get(name)
    if not isinstance(messages, list) or not messages:
        return
    roles = [str(m.get("role")) if isinstance(m, Mapping) else "(not a message)" for m in messages]
    unknown = next((role for role in roles if role not in _ROLES), None)
    twice = [(at, a) for at, (a, b) in enumerate(pairwise(roles)) if a == b != "tool"]
    late = [at for at, role in enumerate(roles) if role in ("system", "developer") and at]
    orphan = [at for at, role in enumerate(roles) if role == "tool" and roles[at - 1 :][:1] == ["user"]]
    if unknown is not None:
        word = _OTHER_ROLES.get(unknown.lower(), "")
        yield f"role {unknown!r}" + (f" (here called {word!r})" if word else nearest(unknown, _ROLES))
    elif late:
        yield f"message {late[0]} is of the system, which speaks first"
    elif twice:
        yield f"messages {twice[0][0]} and {twice[0][0] + 1} are both of the {twice[0][1]}"
    elif orphan:
        yield f"message {orphan[0]} is of a tool that no assistant has called"
    elif name != "prompt" and roles[-1] != "assistant":
        yield f"the last message is of the {roles[-1]}, not of the assistant"
    elif name == "messages" and "user" in roles and roles.index("assistant") < roles.index("user"):
        yield "the assistant speaks before the user"


def content_key(value: Any) -> str:
    """One text per content: blanks at the ends and the order of a dict's keys do not count."""

    def stripped(x: Any) -> Any:
        if isinstance(x, str):
            return x.strip()
        if isinstance(x, Mapping):
            return {str(k): stripped(v) for k, v in x.items() if v is not None}
        return [stripped(one) for one in x] if isinstance(x, list | tuple) else x

    return json.dumps(stripped(value), sort_keys=True, default=str)


def written(value: Any) -> str:
    """What is written: a text itself, or the contents of messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        content = value.get("content", value.get("text"))
        calls = json.dumps(value["tool_calls"], default=str) if value.get("tool_calls") else ""
        return written(content) + calls
    return "".join(map(written, value)) if isinstance(value, list | tuple) else "" if value is None else str(value)


def answer(value: Any) -> str:
    """The text that is trained: of messages the last one."""
    return written(value[-1] if isinstance(value, list) and value else value).strip()

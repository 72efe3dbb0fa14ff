"""Renders templates that come with other models' tokenizers, as data: no files, no code, no end.

Jinja's immutable sandbox keeps a template from everything but what it is given. Beyond that, all
that it may spend is budgeted: every step of a loop, every call and every string that it makes, so
that a template cannot hang or fill the memory either.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_vlm.errors import DataError

if TYPE_CHECKING:
    from jinja2 import nodes

MAX_SOURCE = 2**17
"""Most characters of a template. Published ones have up to some 20,000. Our choice."""

MAX_SPENT = 2**27
"""Most characters that one rendering may make, in all. A step of a loop counts as many as the
template has, since it may write them all. Our choice."""

_CALL = 1024
"""What a call counts as, beside the characters that come of it."""

_FILTERS = frozenset(
    "abs capitalize count d default dictsort e escape first float int items join last length list "
    "lower map max min reject rejectattr replace reverse round safe select selectattr sort string "
    "sum title trim unique upper".split()
)
_GLOBALS = frozenset(("range", "dict", "namespace"))
# Those whose result has any length, whatever they are given.
_GROWING = frozenset(
    "center encode expandtabs format format_map ljust maketrans rjust translate zfill".split()
)

Render = Callable[[Mapping[str, Any]], str]


class _Stopped(Exception):
    """The template itself, or its budget, ends the rendering."""


def compile_template(source: str, name: str) -> Render:
    """Make a function of a template's variables that renders it.

    As transformers does: blocks are trimmed, `raise_exception`, `tojson`, `break`, `continue` and
    `{% generation %}` are there. The time is not: a data set must not depend on it.

    Args:
        source: the template.
        name: what errors call it.

    Raises:
        DataError: no template, or one that reads files or loops recursively. So does rendering,
            for whatever goes wrong in it.
    """
    if len(source) > MAX_SOURCE:
        raise DataError(f"{name}: has {len(source)} characters; expected at most {MAX_SOURCE}")
    environment = _environment(len(source))
    try:
        tree = environment.parse(source)
        _check_tree(tree, name)
        template = environment.from_string(_metered(tree))
    except DataError:
        raise
    except Exception as error:  # a parser's fault may be any: also SyntaxError, RecursionError
        raise DataError(f"{name}: no valid template ({_one_line(error)}); mend it") from error

    def render(variables: Mapping[str, Any]) -> str:
        environment.budget.left = MAX_SPENT
        try:
            return str(template.render(variables))
        except Exception as error:  # whatever a template does wrong
            raise DataError(f"{name}: {_one_line(error)}") from error

    return render


def _environment(source_length: int) -> Any:
    from jinja2 import pass_context
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's words for transformers."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(
                ("name:endgeneration",), drop_needle=True
            )
            return body

    class Environment(ImmutableSandboxedEnvironment):
        """Charges all that is made to `budget`."""

        intercepted_binops = frozenset(("+", "*", "%", "**"))

        def __init__(self) -> None:
            super().__init__(
                trim_blocks=True,
                lstrip_blocks=True,
                # Folding constants would run them before there is a budget.
                optimized=False,
                extensions=["jinja2.ext.loopcontrols", Generation],
            )
            self.budget = threading.local()
            self.step = max(_CALL, source_length)
            self.globals = {key: self.globals[key] for key in _GLOBALS}
            self.globals["raise_exception"] = _raise_exception
            metered = {key: self._metered(self.filters[key]) for key in _FILTERS}
            metered["tojson"] = self._metered(_to_json)
            metered["replace"] = self._metered(_replace)
            metered["join"] = self._metered(_join)
            self.filters = {**metered, "_metered": self.charge, "_stepped": self.stepped}
            self.finalize = pass_context(lambda context, value: self.charge(value))

        def charge(self, value: Any, least: int = 0) -> Any:
            if isinstance(value, str | list | tuple | dict):
                least += len(value)
            self.budget.left -= least
            if self.budget.left < 0:
                raise _Stopped("does not come to an end; expected a chat template")
            return value

        def stepped(self, value: Any) -> list[Any]:
            values = list(value)
            self.charge(None, len(values) * self.step)
            return values

        def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
            self.charge(None, _CALL)
            owner, method = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
            if isinstance(owner, str) and method == "replace":
                return self.charge(_replace(owner, *args))
            if isinstance(owner, str) and method == "join":
                return self.charge(_join(args[0], owner))
            return self.charge(super().call(context, obj, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            small = numbers and max(abs(left), abs(right)) < 2**31
            if operator == "+" or small and operator != "**":
                return self.charge(super().call_binop(context, operator, left, right))
            raise _Stopped(f"{operator} of what is no small number is refused")

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            growing = isinstance(obj, str | bytes) and attr in _GROWING
            return not growing and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            """None: `format` goes the way of all attributes, and is refused there."""

        def _metered(self, function: Callable[..., Any]) -> Callable[..., Any]:
            from functools import wraps

            @wraps(function)  # and with it what jinja passes in first
            def metered(*args: Any, **kwargs: Any) -> Any:
                return self.charge(function(*args, **kwargs))

            return metered

    return Environment()


def _check_tree(tree: nodes.Template, name: str) -> None:
    from jinja2 import nodes

    for kind in (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends):
        if tree.find(kind) is not None:
            raise DataError(
                f"{name}: reads another file ({kind.__name__.lower()}); expected a chat template "
                "of one piece"
            )
    if any(loop.recursive for loop in tree.find_all(nodes.For)):
        raise DataError(f"{name}: loops recursively; expected a plain chat template")


def _metered(tree: nodes.Template) -> nodes.Template:
    """The tree with every loop's values counted, and every string that is put together."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    class Meter(NodeTransformer):
        def visit_For(self, node: nodes.For) -> nodes.For:
            self.generic_visit(node)
            node.iter = nodes.Filter(node.iter, "_stepped", [], [], None, None, lineno=node.lineno)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
            self.generic_visit(node)
            return nodes.Filter(node, "_metered", [], [], None, None, lineno=node.lineno)

    Meter().visit(tree)
    return tree


def _raise_exception(message: str) -> NoReturn:
    raise _Stopped(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise _Stopped(f"tojson(indent={indent!r}): expected at most 16")
    if separators is not None and sum(map(len, separators)) > 16:
        raise _Stopped("tojson: separators of more than 16 characters")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(value)
    if (len(text) + 1) * len(new) > MAX_SPENT:
        raise _Stopped("replace: makes too long a text")
    return text.replace(old, new, -1 if count is None else count)


def _join(value: Any, d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        raise _Stopped("join(attribute=...): expected join alone")
    values = [str(item) for item in value]
    if len(d) * len(values) + sum(map(len, values)) > MAX_SPENT:
        raise _Stopped("join: makes too long a text")
    return d.join(values)


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]

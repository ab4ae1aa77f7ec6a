"""Every field of the configuration is read by the code that it configures."""

import ast
import dataclasses
import typing
from pathlib import Path

from dsv3_jax import config as sections

ROOT = Path(__file__).parent.parent
SECTIONS = {name: cls for name, cls in vars(sections).items() if dataclasses.is_dataclass(cls)}


class Reads(ast.NodeVisitor):
    """Attributes of configuration sections that a module reads, found by following annotations."""

    def __init__(self, found, attributes, script=False):
        self.found, self.attributes = found, attributes  # {(section, field)}; {(class, attribute): section}
        self.script = script  # With few annotations: what is called `config` is a Config.
        self.scopes, self.classes = [{}], []

    def kind(self, node):
        """The section (or annotated class) that an expression is, recording the fields read on the way."""
        if isinstance(node, ast.Name):
            return next((scope[node.id] for scope in reversed(self.scopes) if node.id in scope), None)
        if isinstance(node, ast.Attribute):
            owner = self.kind(node.value)
            if owner in SECTIONS:
                self.found.add((owner, node.attr))
                hint = typing.get_type_hints(SECTIONS[owner]).get(node.attr)
                return getattr(hint, "__name__", None)
            return self.attributes.get((owner, node.attr))
        return None

    def visit_Attribute(self, node):
        self.kind(node)
        self.generic_visit(node)

    def visit_ClassDef(self, node):
        self.classes.append(node.name)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                self.attributes[node.name, item.target.id] = ast.unparse(item.annotation)
        self.generic_visit(node)
        self.classes.pop()

    def visit_FunctionDef(self, node):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        scope = {
            a.arg: ast.unparse(a.annotation).strip("'\"").removesuffix(" | None")
            for a in arguments
            if a.annotation
        }
        if self.classes and arguments and arguments[0].arg == "self":
            scope["self"] = self.classes[-1]
        if self.script and any(a.arg == "config" and a.annotation is None for a in arguments):
            scope["config"] = "Config"
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node):
        (target, *_), value = node.targets, node.value
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        for left, right in pairs:
            if isinstance(left, ast.Name):
                self.scopes[-1][left.id] = self.kind(right)
            elif isinstance(left, ast.Attribute) and isinstance(left.value, ast.Name) and self.classes:
                self.attributes[self.classes[-1], left.attr] = self.kind(right)
        self.generic_visit(node)


def fields_read():
    sources = [ROOT / "train.py", *(ROOT / "dsv3_jax").rglob("*.py")]
    trees = {path: ast.parse(path.read_text("utf-8")) for path in sources if "config" not in path.stem}
    found, attributes = set(), {}
    for _ in range(2):  # Twice: a class may be used before the file that declares it is reached.
        for path, tree in trees.items():
            Reads(found, attributes, script=path.name == "train.py").visit(tree)
    return found


def test_every_field_is_read_outside_the_checks():
    found = fields_read()
    fields = {(name, f.name) for name, cls in SECTIONS.items() for f in dataclasses.fields(cls)}
    assert sorted(fields - found) == []
    assert found <= fields  # A misread type would show here as a field that no section has.


def test_a_field_that_nothing_reads_would_be_seen():
    source = "def f(config: Config):\n    moe = config.model.moe\n    return moe.top_k, other.n_experts\n"
    found = set()
    Reads(found, {}).visit(ast.parse(source))
    assert found == {("Config", "model"), ("ModelConfig", "moe"), ("MoEConfig", "top_k")}

"""Which statements others follow from: a slice of a program, read from its text.

Statements are whole: a loop is one. They are followed by names, backwards, and in doubt one more is taken. A name may
stand for something else behind a statement that assigns it, sets an item or an attribute of it, calls a method of it,
or hands it to a call whose value is dropped. Not seen are functions that change what they are given and return a value,
what changes under another name (`axes` and their `figure`), and what calls change in modules. What is taken as a whole,
from its first statement to its last, may do the first two.
"""

import ast
import re

COMPREHENSION = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
DEFINITION = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
IMPORT = ast.Import | ast.ImportFrom
FREE_OF_EFFECT = {"get", "isin", "item", "items", "keys", "values"}  # any other method may change its object


def within(node: ast.AST, of) -> set[str]:
    """What `of` finds in the parts of a node, without the names that are a function's or a comprehension's own."""
    return set().union(*(of(part) for part in ast.iter_child_nodes(node))) - own(node)


def own(node: ast.AST) -> set[str]:
    """The names that stand for something inside a function or a comprehension alone."""
    if isinstance(node, COMPREHENSION):
        return set().union(*(assigned(each.target) for each in node.generators))
    if isinstance(node, ast.Lambda | ast.FunctionDef | ast.AsyncFunctionDef):
        body = node.body if isinstance(node.body, list) else []
        arguments = {each.arg for each in ast.walk(node.args) if isinstance(each, ast.arg)}
        return arguments.union(*map(assigned, body))
    return set()


def around(node: ast.AST) -> list[ast.AST]:
    """The parts of a function or a comprehension in which names are those around it: [x for x in x]."""
    if isinstance(node, COMPREHENSION):
        return [node.generators[0].iter]
    arguments = getattr(node, "args", None)
    return [*arguments.defaults, *filter(None, arguments.kw_defaults)] if isinstance(arguments, ast.arguments) else []


def assigned(node: ast.AST) -> set[str]:
    """The names to which a statement, or a part of one, may give a value."""
    match node:
        case ast.Name(ctx=ast.Store() | ast.Del()):
            return {node.id}
        case ast.alias():
            return {(node.asname or node.name).split(".")[0]}
    return {node.name} if isinstance(node, DEFINITION) else within(node, assigned)


def replaced(line: ast.stmt) -> set[str]:
    """The names of which nothing is left behind a statement of what they were before it."""
    return assigned(line) if isinstance(line, ast.Assign | IMPORT | DEFINITION) else set()


def used(node: ast.AST) -> set[str]:
    """The names of which a statement, or a part of one, may look at what they were before it."""
    match node:
        case ast.Name(ctx=ast.Load()):
            return {node.id}
        case ast.Constant(value=str()):
            return set(re.findall(r"@(\w+)", node.value))  # as in DataFrame.query("budget == @budget")
        case ast.AugAssign():
            return within(node, used) | assigned(node.target)
        case ast.For():
            return used(node.iter) | (before(node.body) - assigned(node.target)) | before(node.orelse)
    return within(node, used).union(*map(used, around(node)))


def before(lines: list[ast.stmt]) -> set[str]:
    """The names that statements need from before the first of them."""
    needed = set()
    for line in reversed(lines):
        needed = needed - replaced(line) | used(line)
    return needed


def root(node: ast.AST) -> set[str]:
    """`a` of a.b[0].c()."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call):
        node = node.func if isinstance(node, ast.Call) else node.value
    return used(node) if isinstance(node, ast.Name) else set()


def filled(node: ast.AST) -> set[str]:
    """The names of which a statement, or a part of one, sets or deletes an item or an attribute."""
    here = isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load)
    return within(node, filled) | (root(node) if here else set())


def changed(node: ast.AST) -> set[str]:
    """The names whose objects the calls in a statement, or in a part of one, may change."""
    found = within(node, changed)
    match node:
        case ast.Call(func=ast.Attribute(attr=method)) if method not in FREE_OF_EFFECT:
            return found | root(node)
        case ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
            return found
        case ast.Expr():  # its value is dropped: a call is there for what it does to what it is given
            return found | used(node.value)
        case ast.For() if assigned(node.target) & set().union(*(filled(line) | changed(line) for line in node.body)):
            return found | used(node.iter)
    return found


def needed(lines: list[ast.stmt], first: int, last: int) -> set[int]:
    """The places of the statements that `lines[first : last + 1]` follow from; these are taken as a whole."""
    fixed = [isinstance(line, IMPORT) or isinstance(getattr(line, "value", None), ast.Constant) for line in lines]
    variables = set().union(*(assigned(line) for line, never in zip(lines, fixed) if not never))
    behind = {}  # function -> the names that it looks at when it is called
    for line in lines:
        if isinstance(line, DEFINITION):
            behind[line.name] = behind.get(line.name, set()) | used(line)

    def followed(names: set[str]) -> set[str]:
        while more := set().union(*(behind.get(name, set()) for name in names)) - names:
            names = names | more
        return names

    taken, names = set(range(first, last + 1)), followed(before(lines[first : last + 1]))
    for place in reversed(range(first)):
        line = lines[place]
        if names & (assigned(line) | filled(line) | followed(changed(line)) & variables):
            taken.add(place)
            names = names - replaced(line) | followed(used(line))
    return taken

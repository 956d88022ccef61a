"""The repeated blocks of a backbone: what FSDP shares out, and whose activations are computed again, one at a time."""

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def repeated_blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone in the order of its modules, none inside another.

    They are the members of every `nn.Sequential` or `nn.ModuleList` that holds nothing but two or more modules of one
    class with parameters, itself no container: the residual blocks of a ResNet, the layers of a vision transformer.

    Returns:
        Modules of the backbone; none where it has no such list.
    """
    members = list(backbone.children())
    kinds = {type(member) for member in members}
    if isinstance(backbone, _CONTAINERS) and len(members) > 1 and len(kinds) == 1:
        first = members[0]
        if not isinstance(first, _CONTAINERS) and next(first.parameters(), None) is not None:
            return members
    return [block for member in members for block in repeated_blocks(member)]

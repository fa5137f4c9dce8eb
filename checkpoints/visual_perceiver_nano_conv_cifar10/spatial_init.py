"""Initial weights with which attention learns faster: queries read regions of the image, and tokens read similar tokens.

Positions start as sines and cosines of the tokens' places (Vaswani et al. 2017; in two dimensions as in He et al. 2022). A
query starts as the mean of these features over a region: query 0 over the whole image, the next ones over cells of a grid
that gets finer with each doubling of K, in the order of a Sobol sequence. The first K queries then tile the image for every
power of two K, and with equal weights for queries and keys a query reads its region. Training changes all of these weights.
"""

import math

import torch


def features(places: torch.Tensor, spread: torch.Tensor, grid: int, width: int) -> torch.Tensor:
    """Sines and cosines of places, averaged over a Gaussian region.

    Args:
        places: (n, 2) in [0, 1].
        spread: (n,) standard deviation of the region, in the same unit; 0 is a point.
        grid: Tokens along the longer side of the image; sets the highest frequency, a period of four tokens.
        width: D, a multiple of 4.

    Returns:
        (n, D).
    """
    frequencies = torch.linspace(math.pi / 2, max(grid, 2) * math.pi / 2, width // 4)
    angles = places[:, :, None] * frequencies  # (n, 2, D / 4)
    damping = torch.exp(-((frequencies * spread[:, None]) ** 2) / 2)[:, None]  # (n, 1, D / 4)
    return torch.cat([angles.sin() * damping, angles.cos() * damping], dim=-1).flatten(1)


def token_features(height: int, width: int, channels: int) -> torch.Tensor:
    """Features of a grid of tokens, row by row: (1, height * width, channels).

    Example:
        >>> token_features(8, 8, 96).shape
        torch.Size([1, 64, 96])
    """
    longer = max(height, width)
    rows, columns = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1) / longer
    return features(places, torch.zeros(len(places)), longer, channels)[None]


def query_features(num_queries: int, grid: int, channels: int) -> torch.Tensor:
    """Features of the regions of queries: (num_queries, channels).

    Example:
        >>> query_features(64, 8, 96).shape
        torch.Size([64, 96])
    """
    cells = [cell(i) for i in range(num_queries)]
    places, spread = torch.tensor([c[:2] for c in cells]), torch.tensor([c[2] for c in cells])
    return features(places, spread, grid, channels)


def cell(index: int) -> tuple[float, float, float]:
    """Centre and spread of a query's region: the cell of its Sobol point in the coarsest grid of 2^m > index cells.

    Example:
        >>> cell(0), cell(1)
        ((0.5, 0.5, 4.0), (0.75, 0.5, 0.25))
    """
    if index == 0:
        return 0.5, 0.5, 4.0  # so wide that all features vanish
    m = index.bit_length()
    rows, columns = 2 ** ((m + 1) // 2), 2 ** (m // 2)
    x, y = sobol_point(index)
    return (
        (math.floor(x * rows) + 0.5) / rows,
        (math.floor(y * columns) + 0.5) / columns,
        0.3535533905932738 / 2 ** (m / 2),
    )


def sobol_point(index: int) -> tuple[float, float]:
    """A point of the two-dimensional Sobol sequence (Sobol 1967): any 2^m first points lie in 2^m different cells."""
    x, y, direction = 0, 0, 1 << 31
    for bit in range(32):
        if index >> bit & 1:
            x ^= 1 << (31 - bit)
            y ^= direction
        direction ^= direction >> 1
    return x / 2**32, y / 2**32


def mimetic_attention(width: int, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of self-attention similar to those of trained networks (Trockman & Kolter 2023, "Mimetic Initialization of
    Self-Attention Layers"): W_q^T W_k is about 0.7 I in every head, so that similar tokens attend to each other, and the
    product of values and output projection about -0.4 I, each with as much noise.

    Returns:
        Weights of queries, keys and values, (3 D, D), and of the output projection, (D, D), in the layout of `nn.Linear`.

    Example:
        >>> qkv, proj = mimetic_attention(24, 3)
        >>> qkv.shape, proj.shape
        (torch.Size([72, 24]), torch.Size([24, 24]))
    """

    def noisy(scale: float, sign: float) -> torch.Tensor:
        return scale * (torch.randn(width, width) / math.sqrt(width) + sign * torch.eye(width))

    queries, keys = [], []
    for _ in range(heads):
        u, s, vh = torch.linalg.svd(noisy(0.7, 1.0))
        rank = width // heads
        root = s[:rank].sqrt()[:, None]
        queries.append(root * u.T[:rank])
        keys.append(root * vh[:rank])
    u, s, vh = torch.linalg.svd(noisy(0.4, -1.0))
    # proj @ value, as matrices that multiply column vectors, is their product.
    return torch.cat([*queries, *keys, s.sqrt()[:, None] * vh]), u * s.sqrt()

"""NNCLR, NT-Xent and LARS in float64 NumPy, written from the papers and not from the package."""

from dataclasses import dataclass, field

import numpy as np


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def nnclr_loss(anchors, predictions, temperature):
    """Mean over i of -log softmax_k(a_i . p_k / t)[i]: n terms, the other predictions are the negatives."""
    a, p = unit(anchors), unit(predictions)
    losses = []
    for i in range(len(a)):
        logits = np.array([a[i] @ p[k] for k in range(len(p))]) / temperature
        top = logits.max()
        losses.append(np.log(np.exp(logits - top).sum()) + top - logits[i])
    return float(np.mean(losses))


def nt_xent(z1, z2, temperature):
    """SimCLR's loss by its double loop: 2n rows, each against the 2n - 1 others."""
    z = unit(np.concatenate([z1, z2]))
    n, total = len(z1), 0.0
    for i in range(2 * n):
        others = [j for j in range(2 * n) if j != i]
        logits = np.array([z[i] @ z[j] for j in others]) / temperature
        positive = logits[others.index((i + n) % (2 * n))]
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - positive
    return total / (2 * n)


@dataclass
class Queue:
    """FIFO of (unit vector, image id, birth) by a plain list of slots."""

    size: int
    slots: list = field(default_factory=list)
    next: int = 0
    updates: int = 0

    def push(self, rows, ids):
        for row, i in zip(unit(np.asarray(rows, np.float64)), ids, strict=True):
            entry = (row, int(i), self.updates)
            if len(self.slots) < self.size:
                self.slots.append(entry)
            else:
                self.slots[self.next] = entry
            self.next = (self.next + 1) % self.size
        self.updates += 1

    def nearest(self, z):
        """Slot of the entry with the smallest Euclidean distance to each normalised row."""
        table = np.array([entry[0] for entry in self.slots])
        distances = np.linalg.norm(unit(z)[:, None] - table[None], axis=2)
        return distances.argmin(axis=1)


def step_loss(queue, z1, z2, p1, p2, temperature):
    """The symmetric loss of one step; before there is any entry the own embedding is the positive."""
    if not queue.slots:
        n1, n2 = z1, z2
    else:
        n1, n2 = ([queue.slots[s][0] for s in queue.nearest(z)] for z in (z1, z2))
    first = nnclr_loss(np.array(n1), p2, temperature)  # neighbour of view 1, prediction of view 2
    second = nnclr_loss(np.array(n2), p1, temperature)
    return 0.5 * first + 0.5 * second


def lars_step(weights, gradient, buffer, lr, momentum, weight_decay, trust):
    """One update of one parameter; trust None means plain momentum SGD."""
    update = gradient + weight_decay * weights
    if trust is not None:
        w, u = np.linalg.norm(weights), np.linalg.norm(update)
        update = update * (trust * w / u if w > 0 and u > 0 else 1.0)
    buffer = momentum * buffer + update
    return weights - lr * buffer, buffer


def numerical_gradient(function, x, epsilon=1e-6):
    """Central differences of a scalar function of an array."""
    gradient = np.zeros_like(x)
    for index in np.ndindex(*x.shape):
        up, down = x.copy(), x.copy()
        up[index] += epsilon
        down[index] -= epsilon
        gradient[index] = (function(up) - function(down)) / (2 * epsilon)
    return gradient

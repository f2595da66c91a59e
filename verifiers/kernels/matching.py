"""Which prediction stands for which gold box: label-first, IoU-first and optimal, at many thresholds in one call.

Every kernel takes IoU [N, G] and `agrees` [N, G] (same label), and writes per threshold t the total IoU and the number M of
matches. IoU-first pairs boxes whatever their labels; a pair of different labels takes both boxes and gets no credit: neither
IoU nor a match. Were it a match, right boxes with wrong labels would earn the whole completeness.
"""

import numpy as np
from numpy.typing import NDArray

from verifiers.kernels.compiled import compiled

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]

# Far below any difference of IoUs that matters; makes an optimal assignment prefer the right label among equal boxes.
LABEL_PREFERENCE = 1e-9


@compiled
def match_label_first(overlap: Matrix, agrees: Mask, thresholds: Matrix, total: Matrix, matches: Matrix) -> None:
    """For each gold in order: the unused same-label prediction of highest IoU (the first of equals), if that IoU ≥ t.

    Whether a prediction is still free depends on t, so each threshold has a pass of its own.
    """
    num_predictions, num_golds = overlap.shape
    used = np.empty(num_predictions, np.bool_)
    for t in range(thresholds.shape[0]):
        used[:] = False
        total[t] = 0.0
        matches[t] = 0.0
        for g in range(num_golds):
            best = -1.0
            chosen = -1
            for p in range(num_predictions):
                if agrees[p, g] and not used[p] and overlap[p, g] > best:
                    best = overlap[p, g]
                    chosen = p
            if chosen >= 0 and best >= thresholds[t]:
                used[chosen] = True
                total[t] += best
                matches[t] += 1.0


@compiled
def match_iou_first(overlap: Matrix, agrees: Mask, thresholds: Matrix, total: Matrix, matches: Matrix) -> None:
    """Repeatedly the globally best pair of unmatched boxes, until below t. Of equals, a same-label pair, then the lowest indices.

    The sequence of pairs is the same for every t, which only says where it stops: one pass serves all thresholds.
    """
    num_predictions, num_golds = overlap.shape
    used = np.zeros(num_predictions, np.bool_)
    covered = np.zeros(num_golds, np.bool_)
    total[:] = 0.0
    matches[:] = 0.0
    lowest = thresholds.min()
    for _ in range(min(num_predictions, num_golds)):
        best = -1.0
        best_agrees = False
        best_p = -1
        best_g = -1
        for p in range(num_predictions):
            if used[p]:
                continue
            for g in range(num_golds):
                value = overlap[p, g]
                if covered[g] or value < lowest:
                    continue
                if value > best or (value == best and agrees[p, g] and not best_agrees):
                    best = value
                    best_agrees = agrees[p, g]
                    best_p = p
                    best_g = g
        if best_p < 0:
            return
        used[best_p] = True
        covered[best_g] = True
        if best_agrees:
            for t in range(thresholds.shape[0]):
                if best >= thresholds[t]:
                    total[t] += best
                    matches[t] += 1.0


@compiled
def assign(value: Matrix) -> Indices:
    """The column of each row in an assignment of greatest total value; value is [R, C] with R ≤ C, finite.

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987), O(R²·C). Rows and columns count from 1
    inside; column 0 is the root of the path under construction.
    """
    num_rows, num_columns = value.shape
    row_potential = np.zeros(num_rows + 1)
    column_potential = np.zeros(num_columns + 1)
    row_of = np.zeros(num_columns + 1, np.int64)
    previous = np.zeros(num_columns + 1, np.int64)
    slack = np.empty(num_columns + 1)
    visited = np.empty(num_columns + 1, np.bool_)
    for row in range(1, num_rows + 1):
        row_of[0] = row
        column = 0
        slack[:] = np.inf
        visited[:] = False
        while row_of[column] != 0:
            visited[column] = True
            current = row_of[column]
            step = np.inf
            nearest = 0
            for j in range(1, num_columns + 1):
                if visited[j]:
                    continue
                reduced = -value[current - 1, j - 1] - row_potential[current] - column_potential[j]
                if reduced < slack[j]:
                    slack[j] = reduced
                    previous[j] = column
                if slack[j] < step:
                    step = slack[j]
                    nearest = j
            for j in range(num_columns + 1):
                if visited[j]:
                    row_potential[row_of[j]] += step
                    column_potential[j] -= step
                else:
                    slack[j] -= step
            column = nearest
        while column != 0:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    column_of = np.empty(num_rows, np.int64)
    for j in range(1, num_columns + 1):
        if row_of[j] != 0:
            column_of[row_of[j] - 1] = j - 1
    return column_of


@compiled
def match_optimal(
    overlap: Matrix, agrees: Mask, same_label_only: bool, thresholds: Matrix, total: Matrix, matches: Matrix
) -> None:
    """The assignment of greatest total IoU among pairs with IoU ≥ t: of equal labels only, or of any, credited where they agree."""
    num_predictions, num_golds = overlap.shape
    wide = num_predictions <= num_golds
    num_rows, num_columns = (num_predictions, num_golds) if wide else (num_golds, num_predictions)
    value = np.empty((num_rows, num_columns))
    for t in range(thresholds.shape[0]):
        for i in range(num_rows):
            for j in range(num_columns):
                p, g = (i, j) if wide else (j, i)
                counts = overlap[p, g] >= thresholds[t] and (agrees[p, g] or not same_label_only)
                value[i, j] = overlap[p, g] + (LABEL_PREFERENCE if agrees[p, g] else 0.0) if counts else 0.0
        column_of = assign(value)
        total[t] = 0.0
        matches[t] = 0.0
        for i in range(num_rows):
            p, g = (i, column_of[i]) if wide else (column_of[i], i)
            if agrees[p, g] and overlap[p, g] >= thresholds[t]:
                total[t] += overlap[p, g]
                matches[t] += 1.0

"""A simple solution of each sample problem, whose answers the samples' tests expect."""

from functools import cache
from statistics import median


def ferry_pairs(weights, limit):
    waiting, crossings = sorted(weights), 0
    while waiting:
        if len(waiting) > 1 and waiting[0] + waiting[-1] <= limit:
            waiting.pop(0)
        waiting.pop()
        crossings += 1
    return crossings


def longest_rise(levels):
    return max(
        (end - start for start in range(len(levels)) for end in range(start + 1, len(levels) + 1)
         if all(a < b for a, b in zip(levels[start:end], levels[start + 1 : end], strict=False))), default=0,
    )  # fmt: skip


def reads_the_same(note):
    letters = [letter.lower() for letter in note if letter.isalnum()]
    return letters == letters[::-1]


def missing_volume(volumes):
    return min(set(range(1, len(volumes) + 2)) - set(volumes))


def fewest_coins(coins, price):
    reached, steps = {0}, 0
    seen = set(reached)
    while price not in reached:
        reached = {sum + coin for sum in reached for coin in coins if sum + coin <= price} - seen
        if not reached:
            return -1
        seen |= reached
        steps += 1
    return steps


def same_letters(words):
    groups = {}
    for word in words:
        groups.setdefault("".join(sorted(word)), []).append(word)
    return list(groups.values())


def visible_lights(heights):
    return [height for index, height in enumerate(heights) if all(other < height for other in heights[index + 1 :])]


def total_watered(stretches):
    return len({metre for start, end in stretches for metre in range(start, end)})


def well_wrapped(parcels):
    brackets = "".join(letter for letter in parcels if letter in "()[]{}")
    shorter = None
    while brackets != shorter:
        shorter, brackets = brackets, brackets.replace("()", "").replace("[]", "").replace("{}", "")
    return not brackets


def count_islands(chart):
    land = {(y, x) for y, row in enumerate(chart) for x, square in enumerate(row) if square == "#"}
    islands = 0
    while land:
        islands += 1
        shore = [land.pop()]
        while shore:
            y, x = shore.pop()
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & land
            land -= near
            shore += near
    return islands


def running_medians(numbers):
    return [median(numbers[: count + 1]) for count in range(len(numbers))]


def fewest_edits(one, other):
    @cache
    def edits(i, j):
        if not (i and j):
            return i + j
        return min(edits(i - 1, j) + 1, edits(i, j - 1) + 1, edits(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return edits(len(one), len(other))


SOLUTIONS = {name: value for name, value in list(globals().items()) if getattr(value, "__module__", None) == __name__}

"""Scores comparisons with a reward model and tells how often it agrees with people, and where it does not."""
import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from data import BadRow, World
from model import RewardModel, encode, fill_packs, pack

# ---------------------------------------------------------------------------------------------------------------------------------
# Rewards


@torch.no_grad()
def score_all(model: RewardModel, comparisons, world: World, pack_tokens: int = 16384, bar: str = "", on_bad_row: str = "stop") -> list:
    """Rewards of every response of every comparison, in their order and on every rank: one list of K floats for each.

    Rank r scores every world_size-th comparison from the r-th on. Comparisons are encoded on threads, laid into packs of similar fill and
    scored one pack at a time, each prompt once for all its responses. A comparison that cannot be encoded stops the run (BadRow), or with
    on_bad_row "skip" gets None. One longer than `pack_tokens` is a pack of its own.
    """
    mine, rewards = list(range(world.rank, len(comparisons), world.world_size)), {}
    problem = ""

    def encode_row(i):
        try:
            return encode(comparisons[i], model.tokenizer, model.image_processor)
        except ValueError as error:
            return error if isinstance(error, BadRow) else BadRow(f"comparison {i + 1}: {error}")

    with ThreadPoolExecutor() as threads, tqdm(total=len(mine), desc=bar, disable=not bar or world.rank > 0, leave=False) as progress:
        for at in range(0, len(mine), 256):
            part = mine[at:at + 256]
            encoded = list(threads.map(encode_row, part))
            bad = [e for e in encoded if isinstance(e, BadRow)]
            if bad and on_bad_row == "stop":
                problem = str(bad[0])
                break
            rewards |= {i: None for i, e in zip(part, encoded) if isinstance(e, BadRow)}
            good = [(i, e) for i, e in zip(part, encoded) if not isinstance(e, BadRow)]
            for members in fill_packs([e.tokens for _, e in good], pack_tokens):
                values = model(pack([good[m][1] for m in members]).to(model.device)).tolist()
                for m in members:
                    k = len(good[m][1].response_ids)
                    rewards[good[m][0]], values = values[:k], values[k:]
            progress.update(len(part))
    gathered = world.gather_objects((rewards, problem))  # every rank comes here, also the one that met a bad row
    if problems := [p for _, p in gathered if p]:
        raise BadRow(problems[0])
    together = {i: r for part, _ in gathered for i, r in part.items()}
    return [together[i] for i in range(len(comparisons))]


def accuracy(comparisons, rewards, by_category: bool = False):
    """Share of pairs with margin > 0; a tie counts as wrong. With by_category a dict of (accuracy, number of pairs), sorted by name."""
    right = {}
    for comparison, values in zip(comparisons, rewards):
        if values is not None:
            right.setdefault(comparison.category or "all", []).extend(values[w] > values[l] for w, l in comparison.pairs)
    if by_category:
        return {name: (sum(hits) / len(hits), len(hits)) for name, hits in sorted(right.items())}
    hits = [hit for part in right.values() for hit in part]
    return sum(hits) / max(len(hits), 1)


def shuffle_images(comparisons, seed: int = 0) -> list:
    """The comparisons that have images, with the images of another: a model that looks falls to chance on them, one that does not, does not.

    Images move only between prompts with the same number of images, and no prompt keeps its own as long as there are two of a kind.
    """
    visual = [c for c in comparisons if c.images]
    groups = {}
    for i, c in enumerate(visual):
        groups.setdefault(len(c.images), []).append(i)
    out = list(visual)
    for members in groups.values():
        order = random.Random(seed).sample(members, len(members))
        for here, there in zip(order, order[1:] + order[:1]):  # one cycle through all: nobody meets himself
            out[here] = replace(visual[here], images=visual[there].images)
    return out


# ---------------------------------------------------------------------------------------------------------------------------------
# Curves


def draw_curves(file, title: str, panels: list) -> None:
    """An SVG picture with one panel per entry of `panels`: (heading, {name: [(x, y), ...]}, {name: y of a dashed line})."""
    colours, width, height, gap = ("#1f5fbf", "#d2691e", "#2e8b57", "#8b3a8b", "#555555", "#b22222"), 380, 220, 60
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{len(panels) * (width + gap) + gap}" height="{height + 110}" '
           f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
           f'<text x="{gap}" y="24" font-size="15" font-weight="bold">{title}</text>']
    for number, (heading, series, lines) in enumerate(panels):
        left, top = gap + number * (width + gap), 60
        points = [p for line in series.values() for p in line if p[1] == p[1] and abs(p[1]) < 1e30]
        xs, ys = [p[0] for p in points] or [0, 1], [p[1] for p in points] + list(lines.values()) or [0, 1]
        x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
        x1, y1 = (x1 if x1 > x0 else x0 + 1), (y1 if y1 > y0 else y0 + 1)

        def place(x, y):
            return left + (x - x0) / (x1 - x0) * width, top + height - (y - y0) / (y1 - y0) * height

        out.append(f'<text x="{left}" y="{top - 10}">{heading}</text>'
                   f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#ccc"/>')
        for value, y in ((y1, top + 4), (y0, top + height)):
            out.append(f'<text x="{left - 6}" y="{y}" text-anchor="end" fill="#555">{value:.3g}</text>')
        for value, x, anchor in ((x0, left, "start"), (x1, left + width, "end")):
            out.append(f'<text x="{x}" y="{top + height + 16}" text-anchor="{anchor}" fill="#555">{value:g}</text>')
        for name, y in lines.items():
            (ax, ay), (bx, _) = place(x0, y), place(x1, y)
            out.append(f'<line x1="{ax:.1f}" y1="{ay:.1f}" x2="{bx:.1f}" y2="{ay:.1f}" stroke="#999" stroke-dasharray="4 3"/>'
                       f'<text x="{bx:.1f}" y="{ay - 4:.1f}" text-anchor="end" fill="#777">{name}</text>')
        for c, (name, line) in enumerate(series.items()):
            path = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in line if p in points)
            colour = colours[c % len(colours)]
            out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
                       f'<text x="{left + 120 * (c % 3)}" y="{top + height + 32 + 14 * (c // 3)}" fill="{colour}">{name}</text>')
    partial = Path(f"{file}.partial")
    partial.write_text("\n".join(out) + "\n</svg>\n")
    os.replace(partial, file)

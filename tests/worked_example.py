"""One small comparison with all its numbers: the README's table, and the picture beside it.

    python tests/worked_example.py                     prints the table
    python tests/worked_example.py .github/pack.svg    and draws the attention mask and the positions into a file

An image of 2 x 2 tokens, two responses, a tiny Qwen2.5-VL with random weights: five seconds, nothing is downloaded.
"""
import math
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import (CHAT_TEMPLATE, Comparison, Pack, RewardModel, branch_mask, pack, pairwise_loss,  # noqa: E402
                   tiny_backbone)

COLOURS = ("#9aa5b1", "#3b82f6", "#f59e0b")  # prompt, response 1, response 2


def example() -> tuple[RewardModel, Pack, list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        texts = ["user\n", "assistant\n", "What colour?", "red", "sky blue"] * 50
        torch.manual_seed(0)
        model = RewardModel.from_backbone(tiny_backbone(folder, texts, width=64), max_pixels=56 * 56)
    model.processor.tokenizer.chat_template = CHAT_TEMPLATE.partition("{% endif %}")[2]  # without the long system turn
    comparison = Comparison("<image>What colour?", ["red", "sky blue"], [(0, 1)], [Image.new("RGB", (56, 56), "red")])
    packed = pack([comparison], model.processor)
    tokens = [model.processor.tokenizer.decode([i]).replace("\n", "\\n") for i in packed.input_ids.tolist()]
    return model, packed, tokens


def table() -> str:
    """A line for each image token, for the last token of the prompt, and for those of the responses."""
    model, packed, tokens = example()
    mask = branch_mask(packed.branch)
    branches = packed.branch.tolist()
    rows = []
    for i, (token, token_id, branch) in enumerate(zip(tokens, packed.input_ids.tolist(), branches)):
        time, row, column = packed.positions[:, i].tolist()
        visible = mask[i].nonzero()[:, 0].tolist()
        shared = next((k for k, j in enumerate(visible) if j != k), len(visible))  # 0 to here without a gap
        attends_to = f"0-{shared - 1}" + (f", {visible[shared]}-{visible[-1]}" if visible[shared:] else "")
        rows.append(f"{i:3}  {token:<16}{token_id:4}  {branch:^6}  {time:4} {row:3} {column:6}  {attends_to}")
    lines = ["  i  token             id  branch  time row column  attends to"]
    for i, row in enumerate(rows):
        if tokens[i] == "<|image_pad|>" or i + 1 == len(rows) or branches[i + 1] > 0:
            lines.append(row)
    with torch.no_grad():
        rewards = model(packed).rewards
        loss = pairwise_loss(rewards, packed.pairs).item()
    (r1, r2), (last1, last2) = rewards.tolist(), packed.last_token.tolist()
    lines.append(f"last tokens {last1} and {last2}: r_1 = {r1:.3f}, r_2 = {r2:.3f}")
    lines.append(f"pair (0, 1): margin r_1 - r_2 = {r1 - r2:.3f}, loss -log sigmoid(margin) = {loss:.3f} "
                 f"(margin 0: log 2 = {math.log(2):.3f})")
    return "\n".join(lines)


def picture() -> str:
    """The mask as a table of tokens, coloured by branch, with the positions below it."""
    _, packed, tokens = example()
    n, cell, left, top = len(tokens), 18, 150, 60
    branch, mask = packed.branch.tolist(), branch_mask(packed.branch)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + n * cell + 20} {top + n * cell + 110}" '
           f'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>',
           f'<text x="{left}" y="20" font-size="14" font-weight="bold">One comparison in one row of tokens: '
           f'which token attends to which</text>']
    for b, name in enumerate(("prompt with its image", "response 1", "response 2")):
        out.append(f'<rect x="{left + 150 * b}" y="32" width="12" height="12" fill="{COLOURS[b]}"/>'
                   f'<text x="{left + 150 * b + 18}" y="42">{name}</text>')
    for i in range(n):
        y = top + i * cell
        name = tokens[i].replace("&", "&amp;").replace("<", "&lt;")
        out.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end" font-family="monospace">{name}</text>')
        for j in range(n):
            fill = COLOURS[branch[j]] if mask[i, j] else "#f3f4f6"
            out.append(f'<rect x="{left + j * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}" fill="{fill}"/>')
    for row, name in enumerate(("time", "row", "column")):
        y = top + n * cell + 24 + 20 * row
        out.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{name}</text>')
        for i, position in enumerate(packed.positions[row].tolist()):
            out.append(f'<text x="{left + i * cell + cell / 2 - 0.5}" y="{y}" text-anchor="middle" '
                       f'fill="{"#374151" if branch[i] == 0 else COLOURS[branch[i]]}">{position}</text>')
    out.append(f'<text x="{left}" y="{top + n * cell + 94}" fill="#6b7280">M-RoPE positions: both responses start at '
               f'the same number, as each would alone</text>')
    return "\n".join(out) + "\n</svg>\n"


if __name__ == "__main__":
    print(table())
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(picture(), encoding="utf-8")

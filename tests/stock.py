"""Rewards the stock way: one padded row [prompt, response] for each response, its images encoded again for each row.

What the pack must equal, and what tests/benchmark.py measures it against. It shares nothing with the pack but the token
ids and the patches: positions come from transformers' own `get_rope_index`, masks and pictures from its own forward.
"""
import torch
from torch.nn.utils.rnn import pad_sequence

from model import Encoded, pack, read_by_head


def positions_of_video(ids: list[int], grids: list, backbone) -> torch.Tensor:
    """(3, tokens), token by token. transformers goes on after a video elsewhere (see the trap in mrope_positions)."""
    config, step = backbone.config, getattr(backbone.config.vision_config, "tokens_per_second", 1)
    places, grids, start, left = [], iter(grids), 0, []
    for token in ids:
        if token not in (config.image_token_id, config.video_token_id):
            places.append((start, start, start))
            start += 1
            continue
        if not left:
            t, h, w = next(grids)
            later = step if token == config.video_token_id else 1
            left = [(start + later * k, start + y, start + x)
                    for k in range(t) for y in range(h // 2) for x in range(w // 2)]
            after = max(max(place) for place in left) + 1
        places.append(left.pop(0))
        if not left:
            start = after
    return torch.tensor(places).T


def stock_inputs(items: list[Encoded], backbone) -> tuple[dict, torch.Tensor]:
    """What transformers' model takes for the rows of all responses, and the index of each row's last token."""
    rows, images, videos, positions = [], [], [], []
    config, sees, tiled = backbone.config, hasattr(backbone, "visual"), backbone.config.model_type == "internvl"
    for item in items:
        grids = item.image_grid_thw.tolist()
        patches = item.pixel_values.split([t if tiled else t * h * w for t, h, w in grids])
        of_video, ids, g = [False] * len(grids) if tiled else [], item.prompt_ids, 0
        at = 0
        while sees and g < len(grids):
            if ids[at] in (config.image_token_id, config.video_token_id):
                of_video.append(ids[at] == config.video_token_id)
                at += grids[g][0] * grids[g][1] * grids[g][2] // 4
                g += 1
            else:
                at += 1
        for response in item.response_ids:
            row = torch.tensor(ids + response)
            rows.append(row)
            for grid, part, is_video in zip(grids, patches, of_video):
                (videos if is_video else images).append((grid, part))
            if not sees:
                positions.append(torch.arange(len(row)).expand(3, -1))
            elif any(of_video) and config.model_type != "qwen3_vl":
                positions.append(positions_of_video(row.tolist(), grids, backbone))
            else:
                of_kind = [[grid for grid, is_video in zip(grids, of_video) if is_video == kind]
                           for kind in (False, True)]
                image_grid, video_grid = (torch.tensor(found) if found else None for found in of_kind)
                types = ((row == config.image_token_id).int() + 2 * (row == config.video_token_id).int())[None]
                positions.append(backbone.get_rope_index(row[None], types, image_grid, video_grid)[0][:, 0])
    lengths = torch.tensor([len(row) for row in rows])
    device = next(backbone.parameters()).device
    inputs = {"input_ids": pad_sequence(rows, batch_first=True),
              "attention_mask": (torch.arange(lengths.max())[None] < lengths[:, None]).long(),
              "position_ids": pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1)}
    if not sees:
        inputs["position_ids"] = inputs["position_ids"][0]
    for found, grid, pixels in ((images, "image_grid_thw", "pixel_values"),
                                (videos, "video_grid_thw", "pixel_values_videos")):
        if found:
            inputs |= {} if tiled else {grid: torch.tensor([g for g, _ in found])}
            inputs[pixels] = torch.cat([p for _, p in found])
    return {name: x.to(device) for name, x in inputs.items()}, (lengths - 1).to(device)


def stock_rewards(model, items: list[Encoded]) -> torch.Tensor:
    """Rewards (R,) of all responses of all items, in their order."""
    inputs, last = stock_inputs(items, model.backbone)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.backbone(**inputs, use_cache=False).last_hidden_state  # (R, width, D)
    # What the head reads is the model's own affair: it is told where the one response of each row lies
    rows = [pack([item.with_responses([ids])]).to(model.device) for item in items for ids in item.response_ids]
    read = torch.cat([read_by_head(h[:end + 1], row) for h, end, row in zip(hidden, last.tolist(), rows)])
    return model.head(read.to(model.head[-1].weight.dtype))[:, 0]

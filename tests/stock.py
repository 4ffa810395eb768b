"""Rewards the stock way: one padded row [prompt, response] for each response, its images encoded again for each row.

What the pack must equal, and what tests/benchmark.py measures it against. It shares nothing with the pack but the token
ids and the patches: positions come from transformers' own `get_rope_index`, masks and image features from its own
forward. A pack carries pixels as bytes, one frame of each image; here they are normalised as the image processor would,
and an image's one frame is repeated, before transformers' model gets them.
"""
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from model import Encoded, pack, pool_responses


def video_positions(ids: list[int], grids: list, backbone) -> torch.Tensor:
    """(3, tokens), token by token. transformers goes on after a video elsewhere (see the trap in mrope_positions)."""
    config = backbone.config
    video_step = getattr(config.vision_config, "tokens_per_second", 1)
    positions, remaining_grids, next_position, in_visual = [], iter(grids), 0, []
    for token in ids:
        if token not in (config.image_token_id, config.video_token_id):
            positions.append((next_position,) * 3)
            next_position += 1
            continue
        if not in_visual:  # the first token of an image or a video: all its positions
            frames, rows, columns = next(remaining_grids)
            step = video_step if token == config.video_token_id else 1
            in_visual = [(next_position + step * frame, next_position + row, next_position + column)
                         for frame in range(frames) for row in range(rows // 2) for column in range(columns // 2)]
            after = max(max(position) for position in in_visual) + 1
        positions.append(in_visual.pop(0))
        if not in_visual:
            next_position = after
    return torch.tensor(positions).T


def normalized(pixels: torch.Tensor, image_processor, tiled: bool) -> torch.Tensor:
    """Bytes as transformers' processors return them: (x / 255 - mean) / std for each channel. Tiles (n, 3, h, w) keep
    their shape; patches (P, 3, frames, side * side) become (P, 3 * 2 * side * side), a single frame repeated."""
    if pixels.dtype != torch.uint8:
        return pixels
    shape = [1, 3] + [1] * (pixels.dim() - 2)
    mean = torch.tensor(image_processor.image_mean).view(shape)
    std = torch.tensor(image_processor.image_std).view(shape)
    scaled = (pixels / 255 - mean) / std
    if tiled:
        return scaled
    patches, channels, _, area = scaled.shape
    return scaled.expand(patches, channels, 2, area).flatten(1)


def are_videos(item: Encoded, grids: list, config) -> list[bool]:
    """For each grid of an item whether its tokens are a video's."""
    found, place = [], 0
    while len(found) < len(grids):
        token = item.prompt_ids[place]
        if token in (config.image_token_id, config.video_token_id):
            frames, rows, columns = grids[len(found)]
            found.append(token == config.video_token_id)
            place += frames * rows * columns // 4
        else:
            place += 1
    return found


def stock_inputs(items: list[Encoded], backbone, image_processor=None) -> tuple[dict, torch.Tensor]:
    """What transformers' model takes for the rows of all responses, and the index of each row's last token.
    image_processor: its mean and standard deviation are used; None: those of transformers' Qwen2-VL."""
    image_processor = image_processor or Qwen2VLImageProcessorPil()
    rows, images, videos, positions = [], [], [], []
    config = backbone.config
    has_vision, tiled = hasattr(backbone, "visual"), config.model_type == "internvl"
    for item in items:
        grids = item.image_grid_thw.tolist()
        pixels = normalized(item.pixel_values, image_processor, tiled) if grids else item.pixel_values
        patches = pixels.split([frames if tiled else frames * rows * columns for frames, rows, columns in grids])
        videos_of_item = are_videos(item, grids, config) if has_vision else [False] * len(grids)
        for response in item.response_ids:
            row = torch.tensor(item.prompt_ids + response)
            rows.append(row)
            for grid, part, is_video in zip(grids, patches, videos_of_item):
                (videos if is_video else images).append((grid, part))
            if not has_vision:
                positions.append(torch.arange(len(row)).expand(3, -1))
            elif any(videos_of_item) and config.model_type != "qwen3_vl":
                positions.append(video_positions(row.tolist(), grids, backbone))
            else:
                image_grids = [grid for grid, is_video in zip(grids, videos_of_item) if not is_video]
                video_grids = [grid for grid, is_video in zip(grids, videos_of_item) if is_video]
                types = (row == config.image_token_id).int() + 2 * (row == config.video_token_id).int()
                positions.append(backbone.get_rope_index(
                    row[None], types[None], torch.tensor(image_grids) if image_grids else None,
                    torch.tensor(video_grids) if video_grids else None)[0][:, 0])
    lengths = torch.tensor([len(row) for row in rows])
    device = next(backbone.parameters()).device
    inputs = {"input_ids": pad_sequence(rows, batch_first=True),
              "attention_mask": (torch.arange(lengths.max())[None] < lengths[:, None]).long(),
              "position_ids": pad_sequence([p.T for p in positions], batch_first=True).permute(2, 0, 1)}
    if not has_vision:
        inputs["position_ids"] = inputs["position_ids"][0]
    for visuals, grid_name, pixel_name in ((images, "image_grid_thw", "pixel_values"),
                                           (videos, "video_grid_thw", "pixel_values_videos")):
        if visuals:
            if not tiled:
                inputs[grid_name] = torch.tensor([grid for grid, _ in visuals])
            inputs[pixel_name] = torch.cat([part for _, part in visuals])
    return {name: tensor.to(device) for name, tensor in inputs.items()}, (lengths - 1).to(device)


def stock_rewards(model, items: list[Encoded]) -> torch.Tensor:
    """Rewards (R,) of all responses of all items, in their order."""
    inputs, last = stock_inputs(items, model.backbone, model.processor.image_processor)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        hidden = model.backbone(**inputs, use_cache=False).last_hidden_state  # (R, width, D)
    # What the head reads is the model's own affair: it gets a pack of each row's one response
    rows = [pack([item.with_responses([ids])]).to(model.device) for item in items for ids in item.response_ids]
    pooled = torch.cat([pool_responses(states[:end + 1], row)
                        for states, end, row in zip(hidden, last.tolist(), rows)])
    return model.head(pooled.to(model.head[-1].weight.dtype))[:, 0]

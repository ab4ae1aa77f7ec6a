"""A whole batch through the oracles: what a training step should find."""

import numpy as np

from tests.oracles import balance, mtp, transformer

SEQ = 7


def make_batch(config, packed, sequences=2, seed=1):
    """`sequences` rows of random tokens; packed rows hold two documents, cut at different places."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, config.vocab_size, (sequences, SEQ + 1)).astype(np.int32)
    segments = np.ones((sequences, SEQ), np.int32)
    positions = np.broadcast_to(np.arange(SEQ, dtype=np.int32), (sequences, SEQ)).copy()
    mask = np.ones((sequences, SEQ), bool)
    if packed:
        for row in range(sequences):
            cut = (3, 5, 1)[row % 3]
            segments[row, cut:] = 2
            positions[row, cut:] -= cut
            mask[row, cut - 1] = False
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segment_ids": segments,
        "loss_mask": mask,
    }


def oracle_losses(tree, batch, config):
    """(loss, ce, mtp by depth, balance, counts by row) by the oracles, for the whole batch."""
    size = batch["tokens"].shape[0]
    logits, counted, routing = [], [], []
    depth_logits = [([], [], []) for _ in range(config.mtp.depth)]
    for b in range(size):
        where = {"positions": batch["positions"][b], "segment_ids": batch["segment_ids"][b]}
        out = transformer.forward(tree, batch["tokens"][b], config, **where)
        logits.append(out.logits)
        counted.append(batch["loss_mask"][b])
        rows = [r for r in out.routing if r is not None]
        if config.mtp.depth:
            if config.mtp.kind == "sequential":
                depths = mtp.sequential(tree, out.hidden, batch["targets"][b], config, **where)
            else:
                depths = mtp.parallel(tree, out.hidden, config, **where)
            for k, depth in enumerate(depths, start=1):
                valid = mtp.counted(k, where["segment_ids"], batch["loss_mask"][b])
                collected = depth_logits[k - 1]
                collected[0].append(depth.logits[: len(valid)])
                collected[1].append(batch["targets"][b][k:])
                collected[2].append(valid)
                if depth.routing is not None:
                    rows.append(depth.routing)
        routing.append(rows)
    ce = transformer.cross_entropy(
        np.concatenate(logits), np.concatenate(list(batch["targets"])), np.concatenate(counted)
    )
    by_depth = [transformer.cross_entropy(*map(np.concatenate, parts)) for parts in depth_logits]
    total_balance, counts, c = 0.0, [], config.moe
    for row in range(len(routing[0])):
        scores = np.stack([routing[b][row].scores for b in range(size)])
        selected = np.stack([routing[b][row].selected for b in range(size)])
        counts.append(sum(routing[b][row].counts for b in range(size)))
        total_balance += c.sequence_loss * balance.sequence_loss(scores, c.top_k)
        total_balance += c.batch_loss * balance.batch_loss(scores, c.top_k)
        total_balance += c.expert_loss * balance.expert_loss(scores, selected)
        total_balance += c.device_loss * balance.device_loss(scores, selected, c.n_groups)
        total_balance += c.communication_loss * balance.communication_loss(
            scores, selected, c.n_groups, c.topk_groups
        )
    loss = ce + total_balance + (mtp.mtp_loss(by_depth, 0.3) if by_depth else 0.0)
    return loss, ce, by_depth, total_balance, counts

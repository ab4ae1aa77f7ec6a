"""Independent references in float64 numpy, written from the papers' equations and not from the model.

    rope         rotation of a vector; YaRN frequencies and factors (arXiv 2309.00071)
    attention    MLA expanded and absorbed (DeepSeek-V3 eqs 1-11); MHA, GQA, MQA
    ffn, moe     RMSNorm, SwiGLU; DeepSeekMoE routing (DeepSeek-V3 eqs 12-16)
    balance      balance losses of V3 (eqs 17-20) and V2 (eqs 23-31), MaxVio, router-bias update
    transformer  the whole pre-norm model; cross-entropy
    mtp          multi-token prediction, sequential (DeepSeek-V3 eqs 21-25) and parallel (arXiv 2404.19737)
    optimizer    AdamW with decoupled decay, clipping by global norm
    gradient     directional derivatives by central differences, to check gradients against
    from_transformers  Hugging Face models of a given shape and their parameters, in the layout below

Sequences have no batch axis unless a function says so: tests loop over the batch.

Parameters are nested dicts and lists of arrays of any float dtype. Matrices are [in, out]:

    model   embed [vocab, d], layers [layer, ...], final_norm [d], head [d, vocab] (absent: tied to embed),
            mtp [depth, ...]
    layer   attn_norm [d], attn {...}, ffn_norm [d], ffn {...}      ffn is dense, or MoE if it has "w_router"
    attn    MLA: w_dkv [d, kv_rank], kv_norm [kv_rank], w_kr [d, rope], w_uk [kv_rank, heads, nope],
            w_uv [kv_rank, heads, v], w_o [heads, v, d], and for the queries
            with compression     w_dq [d, q_rank], q_norm [q_rank], w_uq [q_rank, heads, nope],
                                 w_qr [q_rank, heads, rope]
            without              w_q [d, heads, nope], w_qr [d, heads, rope]
            MHA, GQA, MQA: w_q [d, heads, head_dim], w_k and w_v [d, kv_heads, head_dim],
            w_o [heads, head_dim, d]
    ffn     dense: w_gate [d, ff], w_up [d, ff], w_down [ff, d]
            MoE: w_router [d, experts], bias [experts] (absent: zeros), experts [dense ffn, ...],
            shared [dense ffn, ...] (one wide FFN or several narrow ones: their outputs are summed)
    mtp     sequential: enorm [d], hnorm [d], eh_proj [2d, d] (embedding's rows first), block (a layer),
            norm [d]
            parallel: block (a layer), norm [d]
"""

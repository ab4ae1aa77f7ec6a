"""Released models to ours and back: Hugging Face folders, and our own folders that Orbax reads.

    errors          one exception with every problem
    safetensors     headers read and checked, bytes read and written in place
    fp8             E4M3 with a scale for each 128x128 block
    hf_config       config.json to ModelConfig, by named properties; hf_config_write the way back
    compare         which fields decide a model's logits, and where two models differ in them
    shapes          the shape of every array of a model, without JAX
    mapping         which tensor of a Hugging Face folder is which part of which array
    sources         where arrays come from: a Hugging Face folder, our folder, a training run, memory
    hf_folder       a Hugging Face folder, checked whole before anything is read from it; hf_files its files
    native          our folder, written from any source, resumed after a kill; native_folder reads it back
    export          a Hugging Face folder written from any source; export_plan says what
    load            arrays on their devices from any source
    opened          a folder of any of these kinds

Every array of the model is kept on disk as Hugging Face keeps it, output features first, so that
conversion moves bytes and computes nothing. A *block* is what lies behind the axes of layers and
experts: one matrix of one expert. Nothing larger than a few of its rows is in memory at once.
"""

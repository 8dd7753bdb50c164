"""
What data.py makes its corpora of, and tokenizer.py its tables.

    synthetic    texts whose entropy is known, and facts that nothing but memory can answer
    tokenfiles   ids that are on disk already, memory-mapped
    download     two corpora of others, once
    philox       random numbers without a state
    foreign      tokenizers in other people's files
"""

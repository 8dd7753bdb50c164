"""
post: what post-training needs besides its commands.

    pack     many documents in one row        tasks    verifiable problems
    rollout  many replies at once             rlhf     rewards from a judge's comparisons
    groups   each reply against its group     practice an update of grpo.py
    picture  what a run answers               release  what others need to chat the same way
    talks    other people's conversations

Not here  the lessons and commands: chat.py, sft.py, grpo.py, heal.py at the top
"""

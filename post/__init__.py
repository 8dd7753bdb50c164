"""
post: what post-training needs besides its commands.

    pack    many documents in one row          tasks    verifiable problems     rollout  many replies
    rlhf    rewards from a judge's words   release  what others need to chat the same way

Not here  the lessons and commands: chat.py, sft.py, grpo.py, heal.py at the top
"""

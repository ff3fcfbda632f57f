def label(share: float) -> str:
    return f"{share * 100:g}"

def as_html(r):
    return ""

"""The paper's tables and figures in small: trained runs to stored figures, figures to one page."""

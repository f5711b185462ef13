"""The network: layers, rotary embedding, masks, attention, decoder, drafter, media embedders."""

// Asks for the memory of the next cell while the arithmetic of this one runs: the tokens of one head lie apart in each
// tensor, which hardware does not foresee.
#pragma once

#include <algorithm>
#include <cstdint>

class Ahead {
  public:
    // The next cell has `rows` x `columns` tokens.
    void start(int64_t rows, int64_t columns) {
        rows_ = rows, columns_ = columns, row_ = column_ = 0;
        tensors_ = tensor_ = 0;
    }
    // One of at most seven tensors: its first token there, and the bytes from a token to that below, to that on the
    // right, and of a token.
    void add(const void* first, int64_t down, int64_t right, int64_t width) {
        parts_[tensors_++] = {static_cast<const char*>(first), down, right, width};
    }

    // Ask for some tokens of one tensor; the next call, for those of the next tensor.
    void fetch() {
        if (row_ >= rows_) return;
        const Part& part = parts_[tensor_];
        const int64_t end = std::min(column_ + AT_ONCE, columns_);
        for (int64_t w = column_; w < end; w++) {
            const char* token = part.first + row_ * part.down + w * part.right;
            for (int64_t line = 0; line < part.width; line += LINE) __builtin_prefetch(token + line, 0, SECOND_LEVEL);
        }
        if (++tensor_ < tensors_) return;
        tensor_ = 0;
        column_ = end;
        if (column_ < columns_) return;
        column_ = 0;
        row_++;
    }

  private:
    static constexpr int64_t AT_ONCE = 8, LINE = 64;
    static constexpr int SECOND_LEVEL = 2;
    struct Part {
        const char* first;
        int64_t down, right, width;
    };
    Part parts_[7];
    int tensors_ = 0, tensor_ = 0;  // how many, and which is next
    int64_t rows_ = 0, columns_ = 0, row_ = 0, column_ = 0;
};

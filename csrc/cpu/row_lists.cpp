#include "row_lists.h"

#include <algorithm>
#include <map>

#include "checks.h"

namespace lasem_fast {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

const int64_t* list_values(const Tensor& t, const char* name, int64_t length, int64_t limit) {
  check_tensor(t, name, ScalarType::Long, {length});
  const int64_t* values = static_cast<const int64_t*>(t.const_data_ptr());
  for (int64_t row = 0; row < length; ++row)
    STD_TORCH_CHECK(values[row] >= 0 && values[row] < limit, name, " must be from 0 to ", limit - 1,
                    ", got ", values[row], " for row ", row);
  return values;
}

std::vector<bool> live_rows(const Tensor* live, int64_t rows) {
  if (!live) return std::vector<bool>(rows, true);
  check_tensor(*live, "live", ScalarType::Bool, {rows});
  const bool* values = static_cast<const bool*>(live->const_data_ptr());
  return std::vector<bool>(values, values + rows);
}

RowLists::RowLists(const Tensor& parents, const Tensor& branches, const Tensor* live,
                   int64_t parent_count, int64_t branch_count) {
  STD_TORCH_CHECK(parents.dim() == 1, "parents must have shape (R,), got ", parents.dim(),
                  " dimensions");
  rows_ = parents.size(0);
  const int64_t* parent = list_values(parents, "parents", rows_, parent_count);
  const int64_t* branch = list_values(branches, "branches", rows_, branch_count);
  const std::vector<bool> alive = live_rows(live, rows_);

  std::vector<int64_t> row_of(parent_count * branch_count, -1);
  std::vector<bool> parent_used(parent_count), branch_used(branch_count);
  for (int64_t row = 0; row < rows_; ++row) {
    int64_t& place = row_of[parent[row] * branch_count + branch[row]];
    STD_TORCH_CHECK(place < 0, "parents and branches must name each pair once, got parent ",
                    parent[row], " through branch ", branch[row], " as rows ", place, " and ", row);
    place = row;
  }
  for (int64_t row = 0; row < rows_; ++row) {
    if (!alive[row]) {
      row_of[parent[row] * branch_count + branch[row]] = -1;
    } else {
      parent_used[parent[row]] = true;
      branch_used[branch[row]] = true;
    }
  }
  for (int64_t b = 0; b < branch_count; ++b)
    (branch_used[b] ? branch_of_ : idle_branches).push_back(b);
  if (slots() == branch_count) {
    row_of_ = std::move(row_of);
  } else {
    row_of_.reserve(parent_count * slots());
    for (int64_t p = 0; p < parent_count; ++p)
      for (const int64_t b : branch_of_) row_of_.push_back(row_of[p * branch_count + b]);
  }

  std::map<std::vector<bool>, std::vector<int64_t>> parents_by_slots;
  std::vector<bool> slots_of(slots());
  for (int64_t p = 0; p < parent_count; ++p) {
    if (!parent_used[p]) {
      idle_parents.push_back(p);
      continue;
    }
    for (int64_t slot = 0; slot < slots(); ++slot)
      slots_of[slot] = row_of_[p * slots() + slot] >= 0;
    parents_by_slots[slots_of].push_back(p);
  }
  parents_.reserve(parent_count);
  for (const auto& [taken, members] : parents_by_slots) {
    LevelClass of{};
    of.parents = parents_.data() + parents_.size();
    of.count = static_cast<int64_t>(members.size());
    of.slots = std::count(taken.begin(), taken.end(), true);
    parents_.insert(parents_.end(), members.begin(), members.end());
    classes.push_back(of);
  }
}

void RowLists::make_room_for_panels(int64_t panels) {
  panels_.resize(classes.size() * panels);
  for (size_t i = 0; i < classes.size(); ++i) classes[i].panels = panels_.data() + i * panels;
}

std::vector<int64_t> RowLists::split_images(int64_t samples, int64_t tasks) const {
  int64_t total = 0;
  for (const LevelClass& of : classes) total += of.count * samples * of.slots;
  std::vector<int64_t> begins;
  for (int64_t task = 0; task < tasks; ++task) {
    // floor(total * task / tasks), without the product
    int64_t cost = total / tasks * task + total % tasks * task / tasks, image = 0;
    for (const LevelClass& of : classes) {
      const int64_t images = of.count * samples;
      if (cost < images * of.slots) {
        image += cost / of.slots;
        break;
      }
      image += images;
      cost -= images * of.slots;
    }
    begins.push_back(image);
  }
  int64_t images = 0;
  for (const LevelClass& of : classes) images += of.count * samples;
  begins.push_back(images);
  return begins;
}

}  // namespace lasem_fast
